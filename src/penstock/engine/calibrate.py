"""Measuring this engine: the time of many kinds of steps, through the real executor.

Steps are made directly, without a replica: a decode at any context length needs no prefill first, because
the executor takes KV that it is told to be there. Rounds go over the whole grid one after the other, so that
a busy moment of the machine touches every point a little instead of one point much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from penstock.core.request import SamplingParams
from penstock.core.step import Chunk, SequenceStart, StepPlan
from penstock.core.step_trace import StepRecord
from penstock.core.units import ceil_div
from penstock.engine.executor import TorchExecutor
from penstock.replica.limits import ReplicaLimits

DECODES = (1, 2, 4, 6, 8, 11, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = (64, 256, 1024, 3000)
CHUNKS = (1, 8, 11, 12, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
STARTS = (0, 512, 2048)
MIXED_DECODES = (4, 16, 48)
MIXED_CHUNKS = (32, 128, 448)
KV_TOKENS_MAX = 65_536  # of one point; more tells nothing new and takes long
STEPS_A_POINT = 5
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Point:
    """A kind of step: `decodes` sequences of `context` tokens, and perhaps a chunk behind `start` tokens."""

    decodes: int
    context: int
    chunk: int = 0
    start: int = 0


def grid(limits: ReplicaLimits) -> list[Point]:
    """The points that this replica's limits allow, those it meets most among them."""
    points = [Point(decodes, context) for decodes in DECODES for context in CONTEXTS]
    points += [Point(0, 0, chunk, start) for chunk in CHUNKS for start in STARTS]
    points += [
        Point(decodes, 512, chunk, start)
        for decodes in MIXED_DECODES
        for chunk in MIXED_CHUNKS
        for start in STARTS[:2]
    ]
    return [point for point in points if _fits(point, limits)]


def _fits(point: Point, limits: ReplicaLimits) -> bool:
    grown = point.context + 2 * STEPS_A_POINT
    tokens = point.decodes * (grown + limits.kv_block_tokens) + point.start + point.chunk
    return (
        point.decodes <= limits.running_max
        and point.decodes + point.chunk <= max(limits.step_tokens_max, point.decodes)
        and max(grown, point.start + point.chunk) <= limits.context_len_max
        and tokens <= min(KV_TOKENS_MAX, (limits.kv_blocks - 1) * limits.kv_block_tokens)
    )


def measure(
    executor: TorchExecutor,
    limits: ReplicaLimits,
    rounds: int,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> list[StepRecord]:
    """One record a point and round: the median of a few steps. Leaves the executor empty."""
    points = grid(limits)
    executor.fill_pages(ceil_div(KV_TOKENS_MAX, limits.kv_block_tokens))
    records = []
    for round_index in range(rounds):
        for index, point in enumerate(points):
            records += _measure_point(executor, limits, point)
            on_point(round_index * len(points) + index + 1, rounds * len(points))
    return records


def _measure_point(executor: TorchExecutor, limits: ReplicaLimits, point: Point) -> list[StepRecord]:
    executor.reset()
    blocks = iter(range(limits.kv_blocks))
    decodes = [
        _sequence(seq_id, point.context, point.context + 2 * STEPS_A_POINT, limits.kv_block_tokens, blocks)
        for seq_id in range(point.decodes)
    ]
    if decodes:  # the first step makes them decode; it also warms up
        chunks = [Chunk(start.seq_id, start.cached_len, 1, True) for start in decodes]
        executor.execute(StepPlan(0, chunks, 0, starts=decodes))
    if point.chunk:
        return _measure_chunks(executor, limits, point, blocks)
    seconds = [executor.execute(StepPlan(0, [], point.decodes)).duration_s for _ in range(STEPS_A_POINT)]
    middle = point.context + 1 + (STEPS_A_POINT + 1) // 2
    return [StepRecord((), point.decodes, point.decodes * middle, point.decodes, median(seconds))]


def _measure_chunks(
    executor: TorchExecutor, limits: ReplicaLimits, point: Point, blocks: Iterator[int]
) -> list[StepRecord]:
    """The chunk again and again, each time of a new sequence on the same blocks."""
    end = point.start + point.chunk
    first = _sequence(0, end, end, limits.kv_block_tokens, blocks)
    seconds = []
    steps = 2 if point.chunk > 256 else STEPS_A_POINT
    for index in range(steps):
        seq_id = 1_000_000 + index
        start = SequenceStart(seq_id, "", first.tokens, end, end, point.start, first.blocks, GREEDY)
        plan = StepPlan(0, [Chunk(seq_id, point.start, point.chunk, True)], point.decodes, starts=[start])
        seconds.append(executor.execute(plan).duration_s)
        executor.forget([seq_id])
    context = point.decodes * (point.context + 1 + (steps + 1) // 2)
    return [StepRecord(((point.chunk, end),), point.decodes, context, point.decodes + 1, median(seconds))]


def _sequence(
    seq_id: int, known_len: int, grown_len: int, block_tokens: int, blocks: Iterator[int]
) -> SequenceStart:
    """A sequence of `known_len` tokens, all but the last with KV, and blocks to grow to `grown_len`."""
    own = tuple(next(blocks) for _ in range(ceil_div(grown_len, block_tokens)))
    tokens = [(seq_id + position) % 97 + 100 for position in range(known_len)]
    return SequenceStart(seq_id, "", tokens, known_len, known_len, known_len - 1, own, GREEDY)
