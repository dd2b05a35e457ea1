"""One layer as nano-operations over ranges of a batch's tokens, and what each costs alone on a device.

    q·k·v ─► decode attention (memory) ─┐
          └► prompt attention ──────────┴► projection ─► all-reduce (net) ─► FFN up, down ─► all-reduce (net)

The batch's tokens stand in one row: decodes first, then the chunks. Every operation is cut into ranges of
that row; two nano-operations depend on each other where their operations do and their ranges meet. Attention
of a chunk's later part also needs the keys of the earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from penstock.twin.costs.hardware import EngineProfile, HardwareProfile
from penstock.twin.costs.layers import RowCosts
from penstock.twin.costs.nano_schedule import (
    COMPUTE,
    KINDS,
    MEMORY,
    NETWORK,
    WHOLE,
    NanoGraph,
    NanoOp,
)
from penstock.twin.costs.nano_search import side_by_side
from penstock.twin.costs.operators import causal_pairs
from penstock.twin.costs.spec import ModelSpec, Parallel
from penstock.twin.costs.work import StepWork

RANGE_MULTIPLE: Final = 128  # rows; ranges end on multiples of it, the tile of the matrix products
LAYERS: Final = 3  # unrolled in a graph: the last three tell what one more layer takes

Range = tuple[int, int]  # of tokens: first, and the one behind the last


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a batch is cut: `attention` for q·k·v and attention, `rest` behind it. The ends are left out."""

    attention: tuple[int, ...]
    rest: tuple[int, ...]

    def scaled(self, rows: int, batch: int) -> Cuts:
        """The same proportions in a batch of `rows`; pieces that would be empty vanish."""

        def scale(cuts: tuple[int, ...]) -> tuple[int, ...]:
            moved = {round(cut * rows / batch / RANGE_MULTIPLE) * RANGE_MULTIPLE for cut in cuts}
            return tuple(sorted(cut for cut in moved if 0 < cut < rows))

        return Cuts(scale(self.attention), scale(self.rest))


@dataclass(frozen=True, slots=True)
class Part:
    """A nano-operation of a layer before it is unrolled: `operation` and its range number name it."""

    operation: str
    kind: int
    range: Range
    after: tuple[int, ...]  # parts of the same layer
    needs_layer: bool = False  # begins a layer: waits for the end of the layer before, on its range


_OPERATIONS: Final = {
    "qkv": COMPUTE,
    "decode attention": MEMORY,
    "prompt attention": COMPUTE,
    "projection": COMPUTE,
    "reduce 1": NETWORK,
    "ffn up": COMPUTE,
    "ffn down": COMPUTE,
    "reduce 2": NETWORK,
}
_OF_ATTENTION: Final = ("qkv", "decode attention", "prompt attention")
_FEEDS: Final = {
    "decode attention": ("qkv",),
    "prompt attention": ("qkv",),
    "projection": ("decode attention", "prompt attention"),
    "reduce 1": ("projection",),
    "ffn up": ("reduce 1",),
    "ffn down": ("ffn up",),
    "reduce 2": ("ffn down",),
}


class LayerGraph:
    """The parts of one layer under `cuts`, and the graph of `LAYERS` layers in a row."""

    def __init__(self, rows: int, cuts: Cuts) -> None:
        self.parts: list[Part] = []
        of: dict[str, list[int]] = {}
        for operation, kind in _OPERATIONS.items():
            inner = cuts.attention if operation in _OF_ATTENTION else cuts.rest
            of[operation] = []
            for piece in pairwise((0, *inner, rows)):
                after = self._feeders(operation, piece, of)
                of[operation].append(len(self.parts))
                self.parts.append(Part(operation, kind, piece, after, operation == "qkv"))
        self._last = of["reduce 2"]
        self.graph = NanoGraph(self._unrolled())
        size = len(self.parts)
        self.groups = [[index + layer * size for layer in range(LAYERS)] for index in range(size)]

    def seconds(self, of_part: Sequence[float]) -> list[float]:
        """Of every operation of the graph."""
        return list(of_part) * LAYERS

    def unrolled(self, order: Sequence[int]) -> list[int]:
        """An order of one layer's parts, layer by layer: every stream repeats itself."""
        size = len(self.parts)
        return [layer * size + part for layer in range(LAYERS) for part in order]

    def ranked(self, of_part: Sequence[float]) -> list[int]:
        """The parts by their longest way to the layer's end, longest first."""
        first = (LAYERS - 1) * len(self.parts)  # of the last layer
        return [index - first for index in self.graph.ranked(self.seconds(of_part)) if index >= first]

    def side_by_side(self, spans: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
        """Pairs of parts that overlap in time, in any of the layers."""
        size = len(self.parts)
        found = {(one % size, other % size) for one, other in side_by_side(spans)}
        return sorted(pair for pair in found if pair[0] != pair[1])

    def total_s(
        self, spans: Sequence[tuple[float, float]], tenths: Sequence[int] | None, layers: int
    ) -> float:
        """Of `layers` layers: each beyond those in the graph takes what the last one added.

        It is never less than what the busiest stream, or the whole device, needs for one layer: a few layers
        are too few for every schedule to come to its rhythm.
        """
        size = len(self.parts)
        ends = [max(end for _, end in spans[layer * size : (layer + 1) * size]) for layer in range(LAYERS)]
        busy, device_s = [0.0] * len(KINDS), 0.0
        for index, part in enumerate(self.parts):
            last_s = spans[index][1] - spans[index][0]
            busy[part.kind] += last_s
            device_s += last_s * tenths[index] / WHOLE if tenths is not None else 0.0
        period_s = max(ends[-1] - ends[-2], ends[-2] - ends[-3], device_s, *busy)
        return ends[0] + (layers - 1) * period_s

    def _feeders(self, operation: str, piece: Range, of: dict[str, list[int]]) -> tuple[int, ...]:
        found = []
        for feeder in _FEEDS.get(operation, ()):
            for index in of[feeder]:
                first, stop = self.parts[index].range
                earlier_keys = operation == "prompt attention"  # of all tokens before its own, too
                if first < piece[1] and (earlier_keys or piece[0] < stop):
                    found.append(index)
        return tuple(found)

    def _unrolled(self) -> list[NanoOp]:
        ops: list[NanoOp] = []
        size = len(self.parts)
        for layer in range(LAYERS):
            for index, part in enumerate(self.parts):
                after = [layer * size + before for before in part.after]
                if layer and part.needs_layer:
                    ends = (last for last in self._last if _meet(part, self.parts[last]))
                    after += [(layer - 1) * size + last for last in ends]
                ops.append(NanoOp(f"{part.operation} {layer}.{index}", part.kind, tuple(after)))
        return ops


def _meet(one: Part, other: Part) -> bool:
    """Whether their ranges have a token in common."""
    return one.range[0] < other.range[1] and other.range[0] < one.range[1]


class LayerCosts:
    """Seconds of a layer's operations on one device, from the same fits as the roofline. Pure."""

    def __init__(
        self, spec: ModelSpec, hardware: HardwareProfile, engine: EngineProfile, parallel: Parallel
    ) -> None:
        self._spec = spec
        self._rows = RowCosts(spec, hardware, engine, parallel)
        self._kernel_s = engine.kernel_s
        self._decode, self._prefill = hardware.decode_attention, hardware.prefill_attention
        self._bandwidth = hardware.bandwidth
        self._heads, self._kv_heads = spec.heads // parallel.tensor, parallel.kv_heads(spec)
        self._pair_s = self._prefill.pair_s(hardware.flops(self._prefill.dtype), self._heads, spec.head_dim)
        self._token_bytes = 2 * self._kv_heads * spec.head_dim * spec.precision.kv_bits / 8
        self._memo: dict[tuple[str, int], float] = {}

    def of_parts(self, parts: Sequence[Part], work: StepWork) -> list[float]:
        return [self._part_s(part, work) for part in parts]

    def _part_s(self, part: Part, work: StepWork) -> float:
        first, stop = part.range
        if part.operation == "decode attention":
            return self._decodes_s(min(stop, work.decodes) - min(first, work.decodes), work)
        if part.operation == "prompt attention":
            return self._chunks_s(first, stop, work)
        key = (part.operation, stop - first)
        seconds = self._memo.get(key)
        if seconds is None:
            seconds = self._memo[key] = self._product_s(part.operation, stop - first)
        return seconds

    def _product_s(self, operation: str, rows: int) -> float:
        if operation == "qkv":
            return self._rows.qkv(rows).seconds
        if operation == "projection":
            return self._rows.projection(rows).seconds
        if operation in ("ffn up", "ffn down"):
            up, down = self._rows.ffn(rows)
            return (up if operation == "ffn up" else down).seconds
        return self._rows.reduce_s(rows)

    def _decodes_s(self, decodes: int, work: StepWork) -> float:
        """Attention of `decodes` of the step's decodes, each with the mean context."""
        if not decodes:
            return 0.0
        fit, context = self._decode, work.decode_context / work.decodes
        seen = sum(
            layers * (context if window is None else min(context, window))
            for window, layers in self._spec.windows
        )
        kv_bytes = decodes * seen / self._spec.layers * self._token_bytes
        seconds = fit.seconds(self._bandwidth, self._heads, self._kv_heads, decodes, kv_bytes)
        return seconds + self._kernel_s

    def _chunks_s(self, first: int, stop: int, work: StepWork) -> float:
        """Attention of the chunks' tokens between two places of the batch's row."""
        fit, spec, total, place = self._prefill, self._spec, 0.0, work.decodes
        for new, context in work.prefills:
            begin, end = max(first, place), min(stop, place + new)
            if begin < end:
                count, seen = end - begin, context - new + (end - place)
                pairs = sum(causal_pairs(count, seen, window) * layers for window, layers in spec.windows)
                total += pairs / spec.layers * self._pair_s
                total += count * fit.row_s(self._heads, self._kv_heads) + fit.kv_head_s * self._kv_heads
                before_bytes = (seen - count) * self._token_bytes
                total += before_bytes / (self._decode.memory_eff * self._bandwidth)
            place += new
        return total + fit.launch_s + self._kernel_s if total else 0.0
