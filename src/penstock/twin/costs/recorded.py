"""Steps that a live server recorded, as samples to fit and as questions to a fitted model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from penstock.core.step_trace import FORMAT, VERSION, StepRecord
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.tables import Sample, load_fitted
from penstock.twin.costs.work import StepWork
from penstock.workloads.fields import object_of, required, shown, time_of, tokens_of
from penstock.workloads.lines import Lines

FIT_STEPS_MAX: Final = 1 << 16  # more tell a fit nothing new; a longer trace is thinned evenly
CHUNKS_MAX: Final = 1 << 16
CONTEXT_SUM_MAX: Final = 1 << 40
SECONDS_MAX: Final = 3600.0
_DAMAGED: Final = "the step trace is damaged, or was not written by `penstock serve --step-trace`"


def work_of(record: StepRecord) -> StepWork:
    """What a cost model is asked about a recorded step. Pure."""
    return StepWork(record.prefills, record.decodes, record.decode_context, record.samples)


def predictor_of(profile: Path) -> Callable[[StepRecord], float]:
    """Seconds by a profile of `penstock calibrate`. Raises ConfigError naming what is wrong with it."""
    model: CostModel = load_fitted(profile)
    return lambda record: model.seconds(work_of(record))


def read_samples(path: Path, steps_max: int = FIT_STEPS_MAX) -> list[Sample]:
    """The steps of a trace and their whole seconds, deciding and telling included.

    At most `steps_max` of them, evenly taken. Raises TraceError naming line and field.
    """
    kept: list[StepRecord] = []
    stride = 1
    for index, record in enumerate(read_steps(path)):
        if index % stride:
            continue
        kept.append(record)
        if len(kept) > steps_max:
            kept, stride = kept[::2], stride * 2
    return [(work_of(record), record.total_s) for record in kept]


def read_steps(path: Path) -> Iterator[StepRecord]:
    """Every record of a step trace, in order. Raises TraceError naming line and field."""
    lines = Lines(path, path.name)
    texts = iter(lines)
    header = object_of(lines, next(texts, ""))
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise lines.error("format", f"it is not `{FORMAT}` version {VERSION}", _DAMAGED)
    for text in texts:
        yield _parse(lines, object_of(lines, text))


def _parse(lines: Lines, row: Mapping[str, Any]) -> StepRecord:
    context = required(lines, row, "decode_context")
    if isinstance(context, bool) or not isinstance(context, int) or not 0 <= context <= CONTEXT_SUM_MAX:
        raise lines.error("decode_context", f"{shown(context)} is not a sum of lengths", _DAMAGED)
    return StepRecord(
        prefills=_prefills(lines, row),
        decodes=tokens_of(lines, "decodes", required(lines, row, "decodes")),
        decode_context=context,
        samples=tokens_of(lines, "samples", required(lines, row, "samples")),
        seconds=_seconds(lines, row, "seconds"),
        schedule_s=_seconds(lines, row, "schedule_s"),
        between_s=_seconds(lines, row, "between_s"),
        ended_s=time_of(lines, "ended_s", required(lines, row, "ended_s")),
    )


def _prefills(lines: Lines, row: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    chunks = required(lines, row, "prefills")
    if not isinstance(chunks, list) or len(chunks) > CHUNKS_MAX:
        raise lines.error("prefills", f"{shown(chunks)} is not a list of chunks", _DAMAGED)
    found = []
    for chunk in chunks:
        if not isinstance(chunk, list) or len(chunk) != 2:
            raise lines.error("prefills", f"{shown(chunk)} is not a chunk and its context", _DAMAGED)
        new, context = (tokens_of(lines, "prefills", value) for value in chunk)
        if not 1 <= new <= context:
            raise lines.error("prefills", f"{new} new tokens make no context of {context}", _DAMAGED)
        found.append((new, context))
    return tuple(found)


def _seconds(lines: Lines, row: Mapping[str, Any], field: str) -> float:
    value = time_of(lines, field, required(lines, row, field))
    if value > SECONDS_MAX:
        raise lines.error(field, f"a step of {value:g} s is no step", _DAMAGED)
    return value
