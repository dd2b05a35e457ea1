"""SplitFuse, dense batches, Orca's batching, Sarathi's stages, flushing: what a step holds, case by case."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from fake_executor import FakeExecutor, expected_output, make_replica
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.core.errors import ConfigError
from penstock.core.events import Preempted, TokenOut
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import StepPlan
from penstock.policies.compose import COMPOSE
from penstock.policies.compose.sarathi import SarathiOptions, chunk_sizes
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

Tables = dict[str, dict[str, object]]


def replica_of(compose: str, options: Tables | None = None, **sizes: int) -> Replica:
    """As `make_replica`, with options and without prefix reuse."""
    limits = ReplicaLimits(
        sizes.get("kv_blocks", 200),
        4,
        sizes.get("running_max", 16),
        sizes.get("step_tokens_max", 32),
        sizes.get("context_len_max", 800),
        prefix_cache=False,
    )
    return Replica(limits, make_stack(PolicySettings(compose=compose, options=options or {})))


def prompts(*lengths: int, output: int = 3) -> list[Request]:
    return [
        Request(f"r{index}", length, output, 0.0, prompt_tokens=[index] * length)
        for index, length in enumerate(lengths)
    ]


def plans_of(replica: Replica, requests: list[Request], check_each: bool = True) -> list[StepPlan]:
    """Everything submitted at once, to the end; outputs are checked."""
    executor, told = FakeExecutor(4), {request.id: [] for request in requests}
    for request in requests:
        replica.submit(request, 0.0)
    while (plan := replica.plan(0.0)) is not None:
        for event in replica.complete(plan, executor.execute(plan), 0.0):
            if isinstance(event, TokenOut):
                told[event.request_id].append(event.token_id)
        if check_each:
            replica.check_invariants()
    assert told == {request.id: expected_output(request) for request in requests}
    return executor.plans


def sizes_of(plans: list[StepPlan]) -> list[int]:
    return [plan.token_count for plan in plans if plan.chunks]


# ---- SplitFuse and dense batches --------------------------------------------------------------------------


def test_splitfuse_fills_every_pass_exactly_while_prompts_wait() -> None:
    plans = plans_of(replica_of("splitfuse"), prompts(50, 7, 21, 90, 3, 40))
    *full, last = sizes_of(plans)
    assert set(full) == {32} and last <= 32


def test_splitfuse_fuses_short_prompts_and_cuts_one_at_most() -> None:
    plans = plans_of(replica_of("splitfuse"), prompts(10, 10, 10, 10, output=1))
    assert [chunk.count for chunk in plans[0].chunks] == [10, 10, 10, 2]
    assert [chunk.count for chunk in plans[1].chunks] == [8]


def test_a_continuation_goes_before_a_prompt_that_ranks_before_it() -> None:
    replica = make_replica(step_tokens_max=8, kv_blocks=60, rank="priority", compose="splitfuse")
    later = Request("later", 20, 1, 0.0, prompt_tokens=[1] * 20, priority=5)
    urgent = Request("urgent", 20, 1, 0.0, prompt_tokens=[2] * 20, priority=0)
    executor = FakeExecutor(4)
    replica.submit(later, 0.0)
    pieces = []
    for _ in range(5):
        plan = replica.plan(0.0)
        assert plan is not None
        pieces.append([(chunk.seq_id, chunk.count) for chunk in plan.chunks])
        replica.complete(plan, executor.execute(plan), 0.0)
        if len(pieces) == 1:
            replica.submit(urgent, 0.0)
    assert pieces == [[(0, 8)], [(0, 8)], [(0, 4), (1, 4)], [(1, 8)], [(1, 8)]]


def test_the_even_rule_spreads_what_full_passes_would_leave_over() -> None:
    even = {"splitfuse": {"budget_rule": "even"}}
    fixed = sizes_of(plans_of(replica_of("splitfuse"), prompts(70, output=1)))
    spread = sizes_of(plans_of(replica_of("splitfuse", even), prompts(70, output=1)))
    assert fixed == [32, 32, 6] and spread == [24, 23, 23]


def test_the_even_rule_counts_decodes() -> None:
    """P = 40 waiting beside D = 4 decodes, budget 32: F = ceil((40 + 4 F) / 32) = 2 passes of 20."""
    replica = replica_of("splitfuse", {"splitfuse": {"budget_rule": "even"}})
    executor = FakeExecutor(4)
    for request in prompts(2, 2, 2, 2, output=30):
        replica.submit(request, 0.0)
    first = replica.plan(0.0)
    assert first is not None
    replica.complete(first, executor.execute(first), 0.0)
    replica.submit(Request("long", 40, 1, 0.0, prompt_tokens=[9] * 40), 0.0)
    pieces = []
    for _ in range(2):
        plan = replica.plan(0.0)
        assert plan is not None
        pieces.append(plan.chunks[0].count)
        replica.complete(plan, executor.execute(plan), 0.0)
    assert pieces == [20, 20]


def test_the_knee_is_a_smaller_pass() -> None:
    knee = {"splitfuse": {"budget_rule": "knee", "knee_tokens": 12}}
    assert sizes_of(plans_of(replica_of("splitfuse", knee), prompts(30, output=1))) == [12, 12, 6]


@pytest.mark.parametrize(
    ("table", "said"),
    [({"budget_rule": "evenly"}, "fixed, knee, even"), ({"budget_rule": "knee"}, "penstock calibrate")],
)
def test_wrong_rules_are_refused_with_the_way_out(table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match="splitfuse") as caught:
        replica_of("splitfuse", {"splitfuse": table})
    assert said in str(caught.value.hint)


def test_dense_batches_are_exactly_full_while_enough_waits() -> None:
    options: Tables = {"dense-fixed": {"batch_tokens": 24}}
    plans = plans_of(replica_of("dense-fixed", options), prompts(50, 7, 21, 90, 3, 40))
    *full, last = sizes_of(plans)
    assert set(full) == {24} and last <= 24


@pytest.mark.parametrize("compose", ["splitfuse", "dense-fixed"])
def test_decodes_are_never_more_than_a_pass_holds(compose: str) -> None:
    plans = plans_of(replica_of(compose, step_tokens_max=5), prompts(*[1] * 16, output=12))
    assert all(plan.token_count <= 5 for plan in plans) and not any(plan.paused for plan in plans)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    budget=st.integers(1, 40),
    compose=st.sampled_from(["splitfuse", "dense-fixed", "sarathi"]),
    rule=st.sampled_from(["fixed", "even"]),
    stages=st.sampled_from([1, 3]),
)
@example([4, 1], 5, "sarathi", "fixed", 3)  # the first stage is 4
@settings(max_examples=200, deadline=None)
def test_invariants_of_steps(lengths: list[int], budget: int, compose: str, rule: str, stages: int) -> None:
    """None empty, none beyond the budget but for decodes, which go on every step; prompts start in order of
    arrival, nobody without being computed, and their pieces are contiguous and sum to the prompt. Passes of
    one size cut one prompt at most."""
    options: Tables = {
        "splitfuse": {"budget_rule": rule},
        "sarathi": {"stages": stages, "span_tokens": 45},
    }
    plans = plans_of(replica_of(compose, options, step_tokens_max=budget), prompts(*lengths))
    pieces: dict[int, list[tuple[int, int]]] = {}
    for plan in plans:
        assert 1 <= plan.token_count <= max(budget, plan.decode_count) and not plan.paused
        assert {start.seq_id for start in plan.starts} <= {chunk.seq_id for chunk in plan.chunks}
        if compose != "sarathi":
            assert plan.decode_count <= budget
            assert sum(not chunk.emits for chunk in plan.chunks) <= 1
        for chunk in plan.chunks:
            pieces.setdefault(chunk.seq_id, []).append((chunk.start, chunk.count))
    assert list(pieces) == sorted(pieces), "nobody is overtaken"
    for seq_id, length in enumerate(lengths):
        ends = [start + count for start, count in pieces[seq_id]]
        assert [start for start, _ in pieces[seq_id]] == [0, *ends[:-1]] and ends[-1] == length


# ---- out of memory ----------------------------------------------------------------------------------------


def drill(preempt: str) -> tuple[int, int]:
    """Card deepspeed-fastgen, test 4: ten blocks, six growing requests. Preemptions, and decodes left out."""
    replica = make_replica(
        kv_blocks=10, prefix_cache=False, compose="splitfuse", preempt=preempt, context_len_max=40
    )
    requests = prompts(3, 5, 2, 6, 4, 3, output=20)
    executor, told, preemptions = FakeExecutor(4), {r.id: [] for r in requests}, 0
    for request in requests:
        replica.submit(request, 0.0)
    while (plan := replica.plan(0.0)) is not None:
        for event in replica.complete(plan, executor.execute(plan), 0.0):
            preemptions += isinstance(event, Preempted)
            if isinstance(event, TokenOut):
                told[event.request_id].append(event.token_id)
        replica.check_invariants()
    assert told == {request.id: expected_output(request) for request in requests}
    return preemptions, sum(len(plan.paused) for plan in executor.plans)


def test_six_growing_requests_in_ten_blocks_all_finish_with_their_outputs() -> None:
    flushes, left_out = drill("flush-newest")
    assert flushes > 0 and left_out > 0


def test_flushing_late_flushes_less() -> None:
    assert drill("flush-newest")[0] < drill("youngest-recompute")[0]


# ---- Orca -------------------------------------------------------------------------------------------------


def test_whole_prompts_join_the_running_decodes() -> None:
    replica = replica_of("selective-batching", step_tokens_max=16)
    executor = FakeExecutor(4)
    for request in prompts(5, 5, output=9):
        replica.submit(request, 0.0)
    first = replica.plan(0.0)
    assert first is not None
    replica.complete(first, executor.execute(first), 0.0)
    replica.submit(Request("long", 100, 2, 0.0, prompt_tokens=[7] * 100), 0.0)
    second = replica.plan(0.0)
    assert second is not None
    assert (second.decode_count, [chunk.count for chunk in second.chunks]) == (2, [100])


# ---- Sarathi's options ------------------------------------------------------------------------------------


def test_stages_shrink_evenly_to_multiples_of_32() -> None:
    sizes = chunk_sizes(512, SarathiOptions(stages=4, low_tokens=128))
    assert sizes == (512, 384, 256, 128)
    assert chunk_sizes(500, SarathiOptions(stages=3, low_tokens=0)) == (500, 384, 256)


def test_a_stage_lasts_for_its_part_of_the_span() -> None:
    options: Tables = {"sarathi": {"stages": 3, "low_tokens": 32, "span_tokens": 600}}
    replica = replica_of("sarathi", options, step_tokens_max=96)
    assert sizes_of(plans_of(replica, prompts(600, output=1))) == [96, 96, 96, 64, 64, 32, 32, 32, 32, 32, 24]


def test_long_prompts_stay_in_the_last_stage() -> None:
    options: Tables = {"sarathi": {"stages": 2, "low_tokens": 32, "span_tokens": 128}}
    replica = replica_of("sarathi", options, step_tokens_max=64)
    assert sizes_of(plans_of(replica, prompts(300, output=1))) == [64, 32, 32, 32, 32, 32, 32, 32, 12]


def test_the_budget_is_rounded_down_to_the_tile() -> None:
    options: Tables = {"sarathi": {"tile_tokens": 16}}
    replica = replica_of("sarathi", options, step_tokens_max=60)
    assert sizes_of(plans_of(replica, prompts(100, output=1))) == [48, 48, 4]
    wide: Tables = {"sarathi": {"tile_tokens": 128}}
    assert sizes_of(plans_of(replica_of("sarathi", wide), prompts(40, output=1))) == [32, 8]


def test_by_default_sarathi_is_what_it_was() -> None:
    assert sizes_of(plans_of(replica_of("sarathi"), prompts(70, 20, output=1))) == [32, 32, 26]


# ---- on views made by hand --------------------------------------------------------------------------------


@dataclass
class Prompt:
    """As much of a prefilling sequence as composers read."""

    total_len: int
    computed_len: int = 0
    block_count: int = 0


@dataclass
class View:
    prefilling: list[Prompt]
    decoding_count: int
    step_tokens_max: int
    blocks_available: int = 1000
    block_tokens: int = 4


def test_a_pass_takes_prompts_as_long_as_there_are_blocks_for_all_of_them() -> None:
    """Two blocks each, and five are available; who is alone goes on without."""
    splitfuse = COMPOSE.make("splitfuse")
    view = View([Prompt(8), Prompt(8), Prompt(8)], 1, 32, blocks_available=5)
    assert [share.count for share in splitfuse.compose(view, 0.0).shares] == [8, 8]
    view.blocks_available = 6
    assert [share.count for share in splitfuse.compose(view, 0.0).shares] == [8, 8, 8]
    view = View([Prompt(8), Prompt(8)], 0, 32, blocks_available=1)
    assert [share.count for share in splitfuse.compose(view, 0.0).shares] == [8]
    view.decoding_count = 1
    assert splitfuse.compose(view, 0.0).shares == []


@pytest.mark.parametrize(
    ("name", "decodes_go_along"), [("prefill-first", False), ("selective-batching", True)]
)
def test_whole_prompts_fill_a_step_to_the_last_token(name: str, decodes_go_along: bool) -> None:
    compose = COMPOSE.make(name)
    view = View([Prompt(20, computed_len=4), Prompt(16), Prompt(1)], 3, 32)
    found = compose.compose(view, 0.0)
    assert [share.count for share in found.shares] == [16, 16] and found.decode is decodes_go_along
    assert compose.prefill_room(view, 0.0) == 0
    view.prefilling = [Prompt(20, computed_len=4)]
    assert compose.prefill_room(view, 0.0) == 16
    view.prefilling = []
    assert compose.compose(view, 0.0).decode and compose.prefill_room(view, 0.0) == 32


@pytest.mark.parametrize("name", ["sarathi", "memory-centric", "splitfuse", "dense-fixed"])
def test_pieces_are_what_decodes_leave(name: str) -> None:
    prompts = [Prompt(20, computed_len=4), Prompt(9), Prompt(30, computed_len=10), Prompt(5)]
    for step_tokens, counts in ((32, [16, 9, 4]), (28, [16, 9]), (3, []), (2, [])):
        composition = COMPOSE.make(name).compose(View(prompts, 3, step_tokens), 0.0)
        assert [share.count for share in composition.shares] == counts


def test_stages_leave_room_for_prompts_that_begin() -> None:
    """In its second stage a prompt may fill the pass up to 64 of 96, decodes included; 32 are left."""
    sarathi = COMPOSE.make("sarathi", options={"stages": 3, "low_tokens": 32, "span_tokens": 600})
    view = View([Prompt(600, computed_len=250)], 4, 96)
    assert [share.count for share in sarathi.compose(view, 0.0).shares] == [60]
    assert sarathi.prefill_room(view, 0.0) == 32
    view.prefilling.append(Prompt(10))
    assert [share.count for share in sarathi.compose(view, 0.0).shares] == [60, 10]
    assert sarathi.prefill_room(view, 0.0) == 22
