"""What a trace is like, in one pass over its rows and with bounded memory.

Failures are counted and otherwise left out: their lengths say nothing. Arrivals count all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from penstock.workloads.sketch import Floats, LengthCounts, Moments, QuantileSketch
from penstock.workloads.trace import SESSIONS_TRACKED_MAX, TraceRow

CHUNK_ROWS = 1 << 16
FANO_WINDOWS_S = (1, 10, 60)
GROUPS_MAX = 200  # of each kind; the rest is counted together as `(other)`
BLOCKS_TRACKED_MAX = 4_000_000  # distinct prefix blocks remembered, about 400 MB at most


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of the answered requests."""

    mean: float
    p5: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: int


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one model, class or tenant."""

    name: str
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Sessions:
    """Conversations. Think time is arrival − (previous arrival + previous response time), never below 0.

    `think_is_gap` says that the trace has no response times, so that the gaps between arrivals are shown.
    `overlaps` counts turns that arrived before the previous answer was done.
    """

    sessions: int
    turns_mean: float
    turns_max: int
    think_gaps: int
    think_s_p50: float | None
    think_s_p95: float | None
    think_is_gap: bool
    overlaps: int


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """What an infinite prefix cache would find: leading blocks of a prompt that were seen before."""

    blocks: int
    blocks_distinct: int
    hit_blocks_frac: float
    hit_tokens_frac: float
    is_lower_bound: bool  # more distinct blocks than are remembered


@dataclass(frozen=True, slots=True)
class Description:
    """Everything `penstock trace describe` shows. `span_s` is from the first to the last arrival."""

    rows: int
    failed: int
    span_s: float
    rate_rps: float | None
    interarrival_mean_s: float | None
    interarrival_cv: float | None
    fano: dict[str, float | None]  # window in seconds → variance over mean of the counts
    prompt: Lengths | None
    output: Lengths | None
    length_correlation: float | None  # Pearson, of prompt and output tokens
    models: list[Group]
    slo_classes: list[Group]
    tenants: list[Group]
    sessions: Sessions | None
    prefix: PrefixReuse | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(rows: Iterable[TraceRow]) -> Description:
    """Pure but for reading `rows`, which must be in time order. Raises whatever reading raises."""
    collector = _Collector()
    for chunk in _chunks(iter(rows)):
        collector.add(chunk)
    return collector.description()


def _chunks(rows: Iterator[TraceRow]) -> Iterator[list[TraceRow]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


class _Collector:
    def __init__(self) -> None:
        self._rows = self._failed = 0
        self._last_arrival_s: float | None = None
        self._gaps = Moments()
        self._windows = [_WindowCounts(width_s) for width_s in FANO_WINDOWS_S]
        self._prompts, self._outputs = LengthCounts(), LengthCounts()
        self._joint = _Joint()
        self._models, self._classes, self._tenants = _Groups(), _Groups(), _Groups()
        self._sessions = _SessionStats()
        self._prefix = _PrefixStats()

    def add(self, chunk: list[TraceRow]) -> None:
        self._add_arrivals(np.array([row.arrival_s for row in chunk]))
        answered = [row for row in chunk if not row.failed]
        self._rows += len(chunk)
        self._failed += len(chunk) - len(answered)
        prompts = np.array([row.prompt_tokens for row in answered], dtype=np.int64)
        outputs = np.array([row.output_tokens for row in answered], dtype=np.int64)
        if answered:
            self._prompts.add(prompts)
            self._outputs.add(outputs)
            self._joint.add(prompts.astype(np.float64), outputs.astype(np.float64))
        for row in chunk:
            self._models.add(row.model or "(none)", row)
            self._classes.add(row.slo_class, row)
            self._tenants.add(row.tenant, row)
            if row.session_id is not None:
                self._sessions.add(row.session_id, row)
            if row.block_hashes is not None and not row.failed:
                self._prefix.add(row.block_hashes, row)

    def _add_arrivals(self, arrivals_s: Floats) -> None:
        with_last = (
            arrivals_s if self._last_arrival_s is None else np.append([self._last_arrival_s], arrivals_s)
        )
        self._gaps.add(np.diff(with_last))
        self._last_arrival_s = float(arrivals_s[-1])
        for window in self._windows:
            window.add(arrivals_s)

    def description(self) -> Description:
        span_s = self._last_arrival_s or 0.0
        return Description(
            rows=self._rows,
            failed=self._failed,
            span_s=span_s,
            rate_rps=(self._rows - 1) / span_s if span_s > 0 else None,
            interarrival_mean_s=self._gaps.mean if self._gaps.count else None,
            interarrival_cv=self._gaps.cv,
            fano={str(window.width_s): window.fano(span_s) for window in self._windows},
            prompt=_lengths(self._prompts),
            output=_lengths(self._outputs),
            length_correlation=self._joint.correlation(),
            models=self._models.groups(),
            slo_classes=self._classes.groups(),
            tenants=self._tenants.groups(),
            sessions=self._sessions.result(),
            prefix=self._prefix.result(),
        )


def _lengths(counts: LengthCounts) -> Lengths | None:
    if not counts.count:
        return None
    p5, p50, p90, p95, p99 = counts.percentiles((5, 50, 90, 95, 99))
    return Lengths(counts.mean, p5, p50, p90, p95, p99, counts.largest)


class _WindowCounts:
    """Fano factor of arrivals in whole windows from second 0, the last, partial one left out."""

    def __init__(self, width_s: int) -> None:
        self.width_s = width_s
        self._sum = self._squares = 0
        self._open_index = self._open_count = 0

    def add(self, arrivals_s: Floats) -> None:
        indices, counts = np.unique((arrivals_s // self.width_s).astype(np.int64), return_counts=True)
        for index, count in zip(indices.tolist(), counts.tolist(), strict=True):
            if index != self._open_index:
                self._sum += self._open_count
                self._squares += self._open_count**2
                self._open_index, self._open_count = index, 0
            self._open_count += count

    def fano(self, span_s: float) -> float | None:
        windows = int(span_s // self.width_s)  # also the index of the open window, which is left out
        if windows < 2 or not self._sum:
            return None
        mean = self._sum / windows
        return (self._squares / windows - mean * mean) / mean


class _Joint:
    """Pearson correlation from running sums about the first chunk's means, which keeps them small."""

    def __init__(self) -> None:
        self._shift: tuple[float, float] | None = None
        self._sums = np.zeros(6)

    def add(self, x: Floats, y: Floats) -> None:
        if self._shift is None:
            self._shift = (float(x.mean()), float(y.mean()))
        x, y = x - self._shift[0], y - self._shift[1]
        self._sums += [len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y]

    def correlation(self) -> float | None:
        n, sx, sy, sxx, syy, sxy = self._sums.tolist()
        if n < 2:
            return None
        spread = (n * sxx - sx * sx) * (n * syy - sy * sy)
        return (n * sxy - sx * sy) / spread**0.5 if spread > 0 else None


class _Groups:
    def __init__(self) -> None:
        self._totals: dict[str, list[int]] = {}

    def add(self, name: str, row: TraceRow) -> None:
        if name not in self._totals and len(self._totals) >= GROUPS_MAX:
            name = "(other)"
        total = self._totals.setdefault(name, [0, 0, 0, 0])
        total[0] += 1
        if row.failed:
            total[1] += 1
        else:
            total[2] += row.prompt_tokens
            total[3] += row.output_tokens

    def groups(self) -> list[Group]:
        """Largest first."""
        ranked = sorted(self._totals.items(), key=lambda item: (-item[1][0], item[0]))
        return [Group(name, *total) for name, total in ranked]


@dataclass(slots=True)
class _OpenSession:
    turns: int
    arrival_s: float
    elapsed_s: float | None


class _SessionStats:
    """Remembers the most recent million sessions; a longer silence starts a session anew."""

    def __init__(self) -> None:
        self._open: dict[str, _OpenSession] = {}
        self._sessions = self._turns = self._turns_max = self._overlaps = 0
        self._think = QuantileSketch()
        self._gap = QuantileSketch()

    def add(self, session_id: str, row: TraceRow) -> None:
        self._turns += 1
        last = self._open.pop(session_id, None)
        if last is None:
            self._sessions += 1
        else:
            self._add_gap(row.arrival_s - last.arrival_s, last.elapsed_s)
        turns = 1 if last is None else last.turns + 1
        self._turns_max = max(self._turns_max, turns)
        self._open[session_id] = _OpenSession(turns, row.arrival_s, row.elapsed_s)
        if len(self._open) > SESSIONS_TRACKED_MAX:
            del self._open[next(iter(self._open))]

    def _add_gap(self, gap_s: float, elapsed_s: float | None) -> None:
        if elapsed_s is None:
            self._gap.add_one(gap_s)
            return
        self._overlaps += gap_s < elapsed_s
        self._think.add_one(max(0.0, gap_s - elapsed_s))

    def result(self) -> Sessions | None:
        if not self._sessions:
            return None
        sketch = self._think if self._think.count else self._gap
        return Sessions(
            sessions=self._sessions,
            turns_mean=self._turns / self._sessions,
            turns_max=self._turns_max,
            think_gaps=sketch.count,
            think_s_p50=sketch.quantile(0.5) if sketch.count else None,
            think_s_p95=sketch.quantile(0.95) if sketch.count else None,
            think_is_gap=sketch is self._gap,
            overlaps=self._overlaps,
        )


class _PrefixStats:
    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._blocks = self._hit_blocks = self._tokens = self._hit_tokens = 0
        self._is_lower_bound = False

    def add(self, hashes: tuple[int, ...], row: TraceRow) -> None:
        hit = 0
        for block in hashes:
            if block not in self._seen:
                break
            hit += 1
        self._blocks += len(hashes)
        self._tokens += row.prompt_tokens
        self._hit_blocks += hit
        self._hit_tokens += min(row.prompt_tokens, hit * row.block_tokens)
        if len(self._seen) < BLOCKS_TRACKED_MAX:
            self._seen.update(hashes[hit:])
        else:
            self._is_lower_bound = True

    def result(self) -> PrefixReuse | None:
        if not self._blocks:
            return None
        return PrefixReuse(
            blocks=self._blocks,
            blocks_distinct=len(self._seen),
            hit_blocks_frac=self._hit_blocks / self._blocks,
            hit_tokens_frac=self._hit_tokens / self._tokens,
            is_lower_bound=self._is_lower_bound,
        )
