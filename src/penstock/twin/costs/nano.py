"""NanoFlow's pipeline in the twin: a `CostModel` that overlaps a layer's operations inside the device.

    host    the next batch is formed while this one runs: host time shows only where it is longer
    nano    the same, and steps large enough run as a searched schedule of nano-batches

A schedule is found once for each kind of step (size, share of decodes, length of context, all coarse) and
then evaluated for each single step with that step's own work. The device takes the schedule only where it
is faster than one operation after the other. `[twin] overlap` chooses; docs/twin-costs.md explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Final

import numpy as np

from penstock.core.errors import ConfigError
from penstock.twin.costs.model import CostModel, Seconds
from penstock.twin.costs.nano_layer import LAYERS, RANGE_MULTIPLE, Cuts, LayerCosts, LayerGraph
from penstock.twin.costs.nano_schedule import PUBLISHED, WHOLE, Interference
from penstock.twin.costs.nano_search import best_order, best_shares
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.work import StepCost, StepWork

OVERLAPS: Final = ("none", "host", "nano")
ROWS_MIN: Final = 4 * RANGE_MULTIPLE  # smaller steps are not cut
BATCH_ROWS: Final = (512, 1024, 2048, 4096)  # sizes that schedules are searched for; others scale one
DECODE_STEPS: Final = 4  # the share of decodes is rounded to such a part
CONTEXTS: Final = (256, 512, 1024, 2048, 4096, 8192, 16_384)
STRUCTURES: Final = 3  # so many of stage 1 go on to stage 2
MEMO_MAX: Final = 512


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a search found for `rows` tokens: cuts, an order of a layer's parts, and their tenths."""

    rows: int
    cuts: Cuts
    order: tuple[int, ...]
    tenths: tuple[int, ...]


class NanoCostModel:
    """A `CostModel` over the roofline of the same model and hardware. Pure: memos only save time."""

    def __init__(
        self, base: RooflineCostModel, overlap: str = "nano", interference: Interference = PUBLISHED
    ) -> None:
        """Raises ConfigError for an unknown overlap, and for a pipeline of devices."""
        spec, hardware, engine, parallel = base.made_of
        _check(overlap)
        if overlap == "nano" and parallel.pipeline > 1:
            raise _bad_overlap(
                "= nano schedules one stage, not a pipeline of devices",
                "Cut the model by tensor parallelism alone.",
            )
        self._base = base
        self._engine = engine
        self._layers = spec.layers
        self._watts_max = hardware.power.max_w * parallel.devices
        self._is_nano = overlap == "nano"
        self._interference = interference
        self._costs = LayerCosts(spec, hardware, engine, parallel)
        self._pipelines: dict[tuple[int, int, int], tuple[Pipeline, ...]] = {}
        self._graphs: dict[tuple[int, Cuts], LayerGraph] = {}

    @property
    def relative_error(self) -> float:
        """Of the operators; that of the interference tables is not known."""
        return self._base.relative_error

    def seconds(self, work: StepWork) -> float:
        host_s = self._host_s(work.decodes + len(work.prefills))
        device_s = self.device_s(work)
        if self._is_nano and work.rows >= ROWS_MIN:
            device_s = self._overlapped_s(work, device_s)
        return max(device_s, host_s)

    def device_s(self, work: StepWork) -> float:
        """The step's kernels one after the other, without the host."""
        return self._base.seconds(work) - self._host_s(work.decodes + len(work.prefills))

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Seconds:
        if self._is_nano and decodes >= ROWS_MIN:
            contexts = (decode_context + index * decodes for index in range(steps))
            return [self.seconds(StepWork((), decodes, context, decodes)) for context in contexts]
        host_s = self._host_s(decodes)
        device_s = np.asarray(self._base.decode_seconds(decodes, decode_context, steps)) - host_s
        return np.maximum(device_s, host_s)

    def step(self, work: StepWork) -> StepCost:
        """The same work in less time: power rises with it, up to the devices' limit."""
        cost, seconds = self._base.step(work), self.seconds(work)
        return replace(cost, seconds=seconds, joules=min(cost.joules, self._watts_max * seconds))

    def layers_s(self, work: StepWork, overlapped: bool = True) -> float:
        """All layers of a step cut into nano-batches; one after the other where not `overlapped`."""
        found = self.pipelines(work)
        if not overlapped:
            return self._piecewise_s(work, found[0])
        return min(self._pipelined_s(work, pipeline) for pipeline in found)

    def _piecewise_s(self, work: StepWork, pipeline: Pipeline) -> float:
        layer = self._graph(work.rows, pipeline.cuts.scaled(work.rows, pipeline.rows))
        return sum(self._costs.of_parts(layer.parts, work)) * self._layers

    def _pipelined_s(self, work: StepWork, pipeline: Pipeline) -> float:
        layer = self._graph(work.rows, pipeline.cuts.scaled(work.rows, pipeline.rows))
        of_part = self._costs.of_parts(layer.parts, work)
        if len(layer.parts) == len(pipeline.order):
            return self._scheduled_s(layer, of_part, pipeline.order, pipeline.tenths)
        # Scaling lost a piece: every operation runs alone
        return self._scheduled_s(layer, of_part, layer.ranked(of_part), (WHOLE,) * len(layer.parts))

    def whole_layers_s(self, work: StepWork) -> float:
        """All layers, uncut, one operation after the other, by the same parts."""
        layer = self._graph(work.rows, Cuts((), ()))
        return sum(self._costs.of_parts(layer.parts, work)) * self._layers

    def pipelines(self, work: StepWork) -> tuple[Pipeline, ...]:
        """The best few schedules for steps of this kind, best first; searched when the first one comes."""
        rows = max((size for size in BATCH_ROWS if size <= work.rows), default=BATCH_ROWS[0])
        decode_part = round(work.decodes / work.rows * DECODE_STEPS)
        context = work.decode_context / work.decodes if work.decodes else 0
        length = min(range(len(CONTEXTS)), key=lambda index: abs(CONTEXTS[index] - context))
        key = (rows, decode_part, length)
        found = self._pipelines.get(key)
        if found is None:
            found = self._pipelines[key] = self._search(_typical(rows, decode_part, CONTEXTS[length]))
        return found

    def _overlapped_s(self, work: StepWork, device_s: float) -> float:
        """`device_s`, less what the schedule saves of its layers."""
        saved_s = self.whole_layers_s(work) - self.layers_s(work)
        return device_s - max(0.0, saved_s)

    def _host_s(self, sequences: int) -> float:
        return self._engine.step_s + self._engine.sequence_s * sequences

    def _graph(self, rows: int, cuts: Cuts) -> LayerGraph:
        graph = self._graphs.get((rows, cuts))
        if graph is None:
            if len(self._graphs) >= MEMO_MAX:
                self._graphs.clear()
            graph = self._graphs[rows, cuts] = LayerGraph(rows, cuts)
        return graph

    def _search(self, work: StepWork) -> tuple[Pipeline, ...]:
        """Stage 1 over all candidates, stage 2 for the most promising."""
        ideal = sorted((self._with_order(work, cuts) for cuts in candidates(work.rows)), key=itemgetter(0))
        found = [self._with_shares(work, cuts, order) for _, cuts, order in ideal[:STRUCTURES]]
        return tuple(pipeline for _, pipeline in sorted(found, key=itemgetter(0)))

    def _with_order(self, work: StepWork, cuts: Cuts) -> tuple[float, Cuts, list[int]]:
        """The seconds and the order of the best schedule of these pieces, interference left out."""
        layer = self._graph(work.rows, cuts)
        of_part = self._costs.of_parts(layer.parts, work)
        after = [part.after for part in layer.parts]
        order = best_order(layer.ranked(of_part), after, lambda tried: self._ideal_s(layer, of_part, tried))
        return self._ideal_s(layer, of_part, order), cuts, order

    def _with_shares(self, work: StepWork, cuts: Cuts, order: Sequence[int]) -> tuple[float, Pipeline]:
        """The best shares for that order, with interference; and the seconds."""
        layer = self._graph(work.rows, cuts)
        of_part = self._costs.of_parts(layer.parts, work)
        tenths, cost_s = best_shares(
            [part.kind for part in layer.parts],
            layer.side_by_side(self._ideal_spans(layer, of_part, order)),
            lambda tried: self._scheduled_s(layer, of_part, order, tried),
        )
        return cost_s, Pipeline(work.rows, cuts, tuple(order), tenths)

    def _ideal_s(self, layer: LayerGraph, of_part: Sequence[float], order: Sequence[int]) -> float:
        """All layers, as if kernels side by side did not slow each other down."""
        return layer.total_s(self._ideal_spans(layer, of_part, order), None, self._layers)

    def _ideal_spans(
        self, layer: LayerGraph, of_part: Sequence[float], order: Sequence[int]
    ) -> list[tuple[float, float]]:
        seconds, unrolled = layer.seconds(of_part), layer.unrolled(order)
        return layer.graph.timeline(seconds, unrolled, None, self._interference)

    def _scheduled_s(
        self, layer: LayerGraph, of_part: Sequence[float], order: Sequence[int], tenths: Sequence[int]
    ) -> float:
        seconds, unrolled = layer.seconds(of_part), layer.unrolled(order)
        spans = layer.graph.timeline(seconds, unrolled, list(tenths) * LAYERS, self._interference)
        return layer.total_s(spans, tenths, self._layers)


def candidates(rows: int) -> list[Cuts]:
    """Two pieces, the first of three to five eighths; attention cut there too, or into four as published."""
    found = []
    for first in sorted({_tile(rows * sixteenths // 16) for sixteenths in range(6, 11)}):
        found.append(Cuts((first,), (first,)))
        quarters = (_tile(first * 2 // 5), first, first + _tile((rows - first) // 2))
        if first < rows // 2 and 0 < quarters[0] and quarters[1] < quarters[2]:
            found.append(Cuts(quarters, (first,)))
    return found


def overlapped(cost: CostModel, overlap: str) -> CostModel:
    """`cost` with that overlap. Raises ConfigError where a cost model knows no operators."""
    _check(overlap)
    if overlap == "none":
        return cost
    if not isinstance(cost, RooflineCostModel):
        raise _bad_overlap(
            f"= {overlap} needs the cost of single operators, which a profile of whole steps does not have",
            "Simulate on shipped hardware, or set it to `none`.",
        )
    return _overlapped(cost, overlap)


@lru_cache(maxsize=8)
def _overlapped(cost: RooflineCostModel, overlap: str) -> NanoCostModel:
    """One for all replicas of a run, so that schedules are searched once."""
    return NanoCostModel(cost, overlap)


def _check(overlap: str) -> None:
    if overlap not in OVERLAPS:
        raise _bad_overlap(f"is {overlap!r}", f"Write one of {', '.join(OVERLAPS)}.")


def _bad_overlap(problem: str, hint: str) -> ConfigError:
    return ConfigError(f"`twin.overlap` {problem}.", hint=hint, param="twin.overlap")


def _tile(rows: int) -> int:
    return rows // RANGE_MULTIPLE * RANGE_MULTIPLE


def _typical(rows: int, decode_part: int, context: int) -> StepWork:
    """A step that stands for its kind: decodes of one context, and one prompt for the rest."""
    decodes = rows * decode_part // DECODE_STEPS
    prompt = rows - decodes
    prefills = [(prompt, prompt)] if prompt else []
    return StepWork(prefills, decodes, decodes * context, decodes)
