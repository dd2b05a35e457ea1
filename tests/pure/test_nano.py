"""Nano-operations: schedules keep the rules, the search is near brute force, costs keep their contract."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
from cost_models import LLAMA_3_8B, NO_OVERHEAD, ideal, llama

from penstock.core.config import resolve
from penstock.core.errors import ConfigError
from penstock.policies.stack import load_preset
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs import nano
from penstock.twin.costs.hardware import load_engine, load_hardware
from penstock.twin.costs.knee import SIZES, knee_tokens
from penstock.twin.costs.nano import NanoCostModel, candidates, overlapped
from penstock.twin.costs.nano_layer import LAYERS, RANGE_MULTIPLE, Cuts, LayerGraph
from penstock.twin.costs.nano_schedule import (
    COMPUTE,
    MEMORY,
    NETWORK,
    PUBLISHED,
    WHOLE,
    Interference,
    NanoGraph,
    NanoOp,
)
from penstock.twin.costs.nano_search import SWEEPS_MAX, best_order, best_shares, side_by_side
from penstock.twin.costs.operators import CollectiveFit
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import Parallel
from penstock.twin.costs.work import StepWork
from penstock.twin.laned import make_twin
from penstock.twin.replica import PathCosts

LLAMA_2_70B = llama(80, 8192, 64, 8, 28_672, 32_000)
TENTHS = (2, 5, 8, 10)  # of brute force


@cache
def model_70b() -> NanoCostModel:
    engine = dataclasses.replace(NO_OVERHEAD, all_reduce="nccl")
    return NanoCostModel(
        RooflineCostModel(LLAMA_2_70B, load_hardware("a100-80g"), engine, Parallel(tensor=8))
    )


FULL = StepWork([(256, 256)] * 4, 1024, 1024 * 400, 1024)


def random_graph(draw: random.Random, count: int) -> tuple[NanoGraph, list[float]]:
    ops = []
    for index in range(count):
        after = tuple(each for each in range(index) if draw.random() < 0.3)
        ops.append(NanoOp(f"op{index}", draw.choice((COMPUTE, COMPUTE, MEMORY, NETWORK)), after))
    return NanoGraph(ops), [draw.uniform(0.5, 3.0) for _ in ops]


def makespan(
    graph: NanoGraph,
    seconds: Sequence[float],
    order: Sequence[int],
    tenths: Sequence[int] | None,
    interference: Interference = PUBLISHED,
) -> float:
    """The end of the last operation."""
    return max(end for _, end in graph.timeline(seconds, order, tenths, interference))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What both stages of the search found for one graph."""

    order: tuple[int, ...]
    tenths: tuple[int, ...]
    cost: float


def search(graph: NanoGraph, seconds: Sequence[float], interference: Interference = PUBLISHED) -> Schedule:
    """Both stages; the goal is the makespan.

    From several first orders. Afterwards the order is looked at once more under the shares that were found,
    and the shares under that order, for as long as it helps.
    """
    after, kinds = [op.after for op in graph.ops], [op.kind for op in graph.ops]

    def ordered(order: Sequence[int], tenths: Sequence[int] | None) -> list[int]:
        return best_order(order, after, lambda tried: makespan(graph, seconds, tried, tenths, interference))

    def shared(order: Sequence[int]) -> Schedule:
        beside = side_by_side(graph.timeline(seconds, order, None, interference))
        tenths, cost = best_shares(
            kinds, beside, lambda tried: makespan(graph, seconds, order, tried, interference)
        )
        return Schedule(tuple(order), tenths, cost)

    def polished(first: Sequence[int]) -> Schedule:
        found = shared(ordered(first, None))
        for _ in range(SWEEPS_MAX):
            again = shared(ordered(found.order, found.tenths))
            if again.cost >= found.cost:
                break
            found = again
        return found

    firsts = (graph.ranked(seconds), list(range(len(seconds))), graph.ranked([1.0] * len(seconds)))
    return min(map(polished, firsts), key=lambda each: each.cost)


def orders(graph: NanoGraph) -> Iterator[tuple[int, ...]]:
    """Every topological order."""
    for order in itertools.permutations(range(len(graph.ops))):
        place = {index: position for position, index in enumerate(order)}
        if all(place[before] < place[index] for index in order for before in graph.ops[index].after):
            yield order


def brute_force(graph: NanoGraph, seconds: Sequence[float]) -> float:
    """The best makespan over every order and every combination of some shares.

    Orders that give the same streams differ only in who goes first, and are all tried.
    """
    return min(
        makespan(graph, seconds, order, tenths)
        for order in orders(graph)
        for tenths in itertools.product(TENTHS, repeat=len(graph.ops))
    )


# ---- schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_keeps_the_rules(seed: int) -> None:
    """Topological, one of a kind at a time, shares that sum to the device at most, each its time."""
    draw = random.Random(seed)
    graph, seconds = random_graph(draw, 8)
    order = graph.ranked(seconds)
    tenths = [draw.randint(1, WHOLE) for _ in seconds]
    spans = graph.timeline(seconds, order, tenths, PUBLISHED)
    for index, (start, end) in enumerate(spans):
        op = graph.ops[index]
        assert all(spans[before][1] <= start + 1e-12 for before in op.after)
        assert end - start == pytest.approx(seconds[index] / PUBLISHED.kept(op.kind)[tenths[index]])
    for start, _ in spans:
        now = [index for index, span in enumerate(spans) if span[0] <= start < span[1]]
        assert sum(tenths[index] for index in now) <= WHOLE
        assert len({graph.ops[index].kind for index in now}) == len(now)


@pytest.mark.parametrize("seed", range(20))
def test_the_search_is_within_5_percent_of_brute_force(seed: int) -> None:
    """Random graphs of four or five operations; brute force tries shares of 2, 5, 8 and 10 tenths."""
    draw = random.Random(100 + seed)
    graph, seconds = random_graph(draw, 4 + seed % 2)
    found = search(graph, seconds)
    assert found.cost == pytest.approx(makespan(graph, seconds, found.order, found.tenths))
    assert found.cost <= 1.05 * brute_force(graph, seconds)


@pytest.mark.parametrize("seed", range(20))
def test_on_eight_operations_it_stays_near_many_random_schedules(seed: int) -> None:
    """No one of 3,000 schedules drawn at random is more than 5 % better."""
    draw = random.Random(200 + seed)
    graph, seconds = random_graph(draw, 8)
    found = search(graph, seconds).cost
    best = float("inf")
    for _ in range(3000):
        order: list[int] = []
        while len(order) < len(seconds):
            free = [
                index
                for index in range(len(seconds))
                if index not in order and set(graph.ops[index].after) <= set(order)
            ]
            order.append(draw.choice(free))
        tenths = [draw.choice(TENTHS) for _ in seconds]
        best = min(best, makespan(graph, seconds, order, tenths))
    assert found <= 1.05 * best


def test_other_interference_chooses_another_schedule() -> None:
    graph = NanoGraph([NanoOp("product", COMPUTE, ()), NanoOp("copy", NETWORK, ())])
    hostile = tuple([0.0] + [0.01] * 9 + [1.0])
    friendly = search(graph, [1.0, 1.0])
    apart = search(graph, [1.0, 1.0], Interference(hostile, hostile))
    assert friendly.cost < 1.7 < 1.99 <= apart.cost
    assert friendly.tenths != apart.tenths


# ---- a layer ----------------------------------------------------------------------------------------------


def test_ranges_of_each_operation_partition_the_batch() -> None:
    for cuts in candidates(2048):
        layer = LayerGraph(2048, cuts)
        for operation in {part.operation for part in layer.parts}:
            ranges = [part.range for part in layer.parts if part.operation == operation]
            assert len(ranges) >= 2
            assert ranges[0][0] == 0 and ranges[-1][1] == 2048
            assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
            assert all(first % RANGE_MULTIPLE == 0 for first, _ in ranges)


def test_parts_depend_where_their_ranges_meet() -> None:
    layer = LayerGraph(1024, Cuts((256, 512), (512,)))
    by_name = {(part.operation, part.range): part for part in layer.parts}
    feeding = by_name["projection", (0, 512)].after
    assert {layer.parts[index].range for index in feeding} == {(0, 256), (256, 512)}
    keys = by_name["prompt attention", (512, 1024)].after
    assert {layer.parts[index].range for index in keys} == {(0, 256), (256, 512), (512, 1024)}
    assert len(layer.graph.ops) == LAYERS * len(layer.parts)


@pytest.mark.parametrize("operation", ["prompt attention", "decode attention"])
def test_pieces_of_attention_add_up_to_the_whole(operation: str) -> None:
    """Pairs of chunks do exactly; a launch a piece, and streams of fewer decodes, come on top."""

    def seconds_of(cuts: Cuts) -> list[float]:
        parts = LayerGraph(2048, cuts).parts
        found = zip(parts, model_70b()._costs.of_parts(parts, FULL), strict=True)
        return [seconds for part, seconds in found if part.operation == operation and seconds]

    (whole_s,), pieces_s = seconds_of(Cuts((), ())), seconds_of(Cuts((640, 1408), (1408,)))
    launches_s = (len(pieces_s) - 1) * 20e-6
    assert whole_s <= sum(pieces_s) <= whole_s * 1.1 + launches_s


def test_whole_layers_are_the_rooflines() -> None:
    """The parts of an uncut layer add up to what the roofline charges for all but head and host."""
    model = model_70b()
    assert model.whole_layers_s(FULL) == pytest.approx(model.device_s(FULL), rel=0.01)


# ---- the cost model ---------------------------------------------------------------------------------------


def test_cut_without_overlap_loses_and_with_it_wins() -> None:
    model = model_70b()
    plain, cut, full = (
        model.whole_layers_s(FULL),
        model.layers_s(FULL, overlapped=False),
        model.layers_s(FULL),
    )
    assert 0.82 <= plain / cut <= 0.97
    assert 1.08 <= plain / full <= 1.30


def test_without_limits_of_memory_and_network_nothing_is_left_to_overlap() -> None:
    """Card nanoflow, test 2: infinite bandwidths, and all three reach at least 95 % of the optimum."""
    hardware = dataclasses.replace(
        ideal(312e12, 1e21),
        links={
            "engine": {
                8: CollectiveFit((0.0,), (1e-12,), (1e21,), load_hardware("a100-80g").links["nccl"][8].error)
            }
        },
    )
    model = NanoCostModel(RooflineCostModel(LLAMA_2_70B, hardware, NO_OVERHEAD, Parallel(tensor=8)))
    work = StepWork([(256, 256)] * 4, 1024, 1024 * 400, 1024)
    ends = LLAMA_2_70B.vocab * LLAMA_2_70B.hidden * work.samples / work.rows
    best_s = 2 * work.rows * (LLAMA_2_70B.linear_weights() + ends) / (8 * 312e12)
    extra_s = model.device_s(work) - model.whole_layers_s(work)
    for layers_s in (
        model.whole_layers_s(work),
        model.layers_s(work, overlapped=False),
        model.layers_s(work),
    ):
        assert best_s / (layers_s + extra_s) >= 0.95


def test_a_leap_is_its_steps_bit_for_bit() -> None:
    model = NanoCostModel(RooflineCostModel(LLAMA_3_8B, load_hardware("h100-sxm"), load_engine("vllm-2024")))
    for decodes in (3, 700):
        for steps in (5, 40):
            leap = [float(each) for each in model.decode_seconds(decodes, decodes * 900, steps)]
            single = [
                model.seconds(StepWork((), decodes, decodes * 900 + index * decodes, decodes))
                for index in range(steps)
            ]
            assert leap == single


def test_equal_work_costs_the_same_in_any_order_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "STRUCTURES", 1)  # a third of the time
    engine = dataclasses.replace(NO_OVERHEAD, all_reduce="nccl")
    base = RooflineCostModel(LLAMA_2_70B, load_hardware("a100-80g"), engine, Parallel(tensor=8))
    other = StepWork([(1500, 1500)], 548, 548 * 3000, 549)
    one, two = NanoCostModel(base), NanoCostModel(base)
    assert [one.seconds(FULL), one.seconds(other)] == [two.seconds(other), two.seconds(FULL)][::-1]


def test_host_time_hides_behind_the_device() -> None:
    base = RooflineCostModel(LLAMA_3_8B, load_hardware("h100-sxm"), load_engine("vllm-2024"))
    work = StepWork([(300, 300)], 64, 64_000, 64)
    host_s = 0.002017 + 65 * 0.0002353
    hidden = NanoCostModel(base, "host").seconds(work)
    assert hidden == pytest.approx(max(base.seconds(work) - host_s, host_s))


def test_overlap_is_never_slower_than_none() -> None:
    model = model_70b()
    for rows in (128, 700, 2048):
        for decodes in (0, rows // 2):
            prefills = [(rows - decodes, rows - decodes)] if rows > decodes else []
            work = StepWork(prefills, decodes, decodes * 500, decodes)
            assert model.seconds(work) <= model._base.seconds(work)


def test_wrong_overlaps_are_refused_with_the_way_out() -> None:
    base = RooflineCostModel(LLAMA_3_8B, load_hardware("h100-sxm"), NO_OVERHEAD)
    assert overlapped(base, "none") is base
    with pytest.raises(ConfigError, match=r"twin.overlap") as caught:
        overlapped(base, "nana")
    assert "none, host, nano" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="single operators"):
        overlapped(model_70b(), "nano")
    staged = RooflineCostModel(LLAMA_3_8B, load_hardware("h100-sxm"), NO_OVERHEAD, Parallel(pipeline=2))
    with pytest.raises(ConfigError, match="one stage"):
        overlapped(staged, "nano")


def test_the_preset_runs_on_it_and_lanes_refuse_it() -> None:
    base = RooflineCostModel(LLAMA_3_8B, load_hardware("h100-sxm"), NO_OVERHEAD)
    limits = ReplicaLimits(1000, 16, 64, 2048, 4096)
    path = PathCosts(0.0, 0.0, 0.0)

    def twin_of(**flags: str) -> object:
        found = resolve(file_text=None, file_name="", environ={}, flags=flags, load_preset=load_preset)
        return make_twin(found.settings, limits, base, path, lambda outcome: None)

    twin_of(preset="nanoflow")
    with pytest.raises(ConfigError, match="lanes"):
        twin_of(**{"preset": "nanoflow", "policies.lanes": "static"})


# ---- the knee ---------------------------------------------------------------------------------------------


def test_the_knee_is_where_throughput_stops_rising() -> None:
    class Flat:
        """A step of up to 200 tokens takes as long as one, and then as its tokens say."""

        relative_error = 0.0

        def seconds(self, work: StepWork) -> float:
            return max(work.rows, 200) * 1e-4

    assert knee_tokens(Flat()) == 192  # type: ignore[arg-type]
    assert knee_tokens(Flat(), rows_max=64) == 64  # type: ignore[arg-type]
    h100 = RooflineCostModel(LLAMA_3_8B, load_hardware("h100-sxm"), load_engine("vllm-2025"))
    assert knee_tokens(h100) in SIZES[6:]
