"""Two lanes over one set of books: switches, memory, who joins when; and the device that both share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import ConfigError, TraceError
from penstock.core.events import Finished, Preempted
from penstock.core.request import Request
from penstock.core.settings import PolicySettings, Settings
from penstock.core.step import StepResult
from penstock.policies.context import ServiceTerms
from penstock.policies.lanes import Batch, Lane, Shares
from penstock.policies.stack import make_stack
from penstock.replica.journal import header
from penstock.replica.laned import LanedReplica, LaneStep
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs.phase_sweep import points, sweep
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.shares import SharedDevice
from penstock.twin.costs.tables import fit_steps
from penstock.twin.costs.work import StepWork
from penstock.twin.exact import replay_journal
from penstock.twin.laned import make_twin
from penstock.twin.replica import PathCosts

PREFILL, DECODE = Lane.PREFILL, Lane.DECODE


def make(kv_blocks: int = 64, step_tokens: int = 64, **policies: str) -> LanedReplica:
    sizes = ReplicaLimits(kv_blocks, 4, 8, step_tokens, 512)
    return LanedReplica(sizes, make_stack(PolicySettings(**{"lanes": "static", **policies})))


def begin(replica: LanedReplica, lane: Lane, now_s: float = 0.0) -> LaneStep:
    step = replica.plan_lane(lane, now_s)
    assert step is not None
    return step


def end(replica: LanedReplica, lane: Lane, now_s: float = 0.0) -> list[Any]:
    replica.check_invariants()
    events = replica.complete_lane(replica.in_progress[lane], StepResult(None), now_s)
    replica.check_invariants()
    return events


def prefilled(replica: LanedReplica, name: str, prompt: int, output: int) -> None:
    replica.submit(Request(name, prompt, output, 0.0), 0.0)
    begin(replica, PREFILL)
    end(replica, PREFILL)


def test_both_lanes_have_a_step_in_progress_and_blocks_change_lanes_as_they_are() -> None:
    replica = make()
    prefilled(replica, "a", 10, 5)
    blocks = list(replica.running[0].blocks)
    replica.submit(Request("b", 12, 5, 0.0), 0.0)
    decode, prompt = begin(replica, DECODE), begin(replica, PREFILL)
    assert decode.batch == Batch((), 1, 11)
    assert prompt.batch == Batch(((12, 12),))
    assert replica.running[0].blocks == blocks
    end(replica, PREFILL)
    end(replica, DECODE)
    assert begin(replica, DECODE).batch == Batch((), 2, 12 + 13), "one token for a; b begins with this step"


def test_who_joins_while_decodes_run_waits_for_the_next_step() -> None:
    replica = make()
    prefilled(replica, "a", 8, 5)
    replica.submit(Request("b", 8, 5, 0.0), 0.0)
    begin(replica, DECODE)
    begin(replica, PREFILL)
    end(replica, PREFILL)
    end(replica, DECODE)
    a, b = replica.running
    assert (a.output_len, b.output_len) == (2, 1)


def test_a_prefilling_request_with_one_token_to_make_ends_at_once() -> None:
    replica = make()
    prefilled(replica, "a", 8, 5)
    begin(replica, DECODE)
    replica.submit(Request("b", 8, 1, 0.0), 0.0)
    begin(replica, PREFILL)
    events = end(replica, PREFILL)
    assert [event.request_id for event in events if isinstance(event, Finished)] == ["b"]
    assert replica.stats().kv_blocks_used == len(replica.running[0].blocks), "and gives its blocks back"


def test_a_decode_that_lacks_a_block_waits_for_the_prompt_rather_than_lose_its_own() -> None:
    """Then prompts stop until it has been served: memory is the decode lane's first."""
    replica = make(kv_blocks=5)
    prefilled(replica, "a", 8, 8)
    replica.submit(Request("b", 12, 4, 0.0), 0.0)
    begin(replica, PREFILL)
    assert replica.plan_lane(DECODE, 0.0) is None, "all blocks are a's and b's, and b's are in use"
    assert replica.plan_order == (DECODE, PREFILL)
    end(replica, PREFILL)
    assert replica.plan_lane(PREFILL, 0.0) is None
    step = begin(replica, DECODE)
    assert step.plan.decode_count == 1
    events = end(replica, DECODE)
    assert [event.request_id for event in events if isinstance(event, Preempted)] == ["b"]
    assert replica.plan_order == (PREFILL, DECODE)


def test_it_plans_by_lane_only() -> None:
    with pytest.raises(AssertionError, match="by lane"):
        make().plan(0.0)


# ---- switches ---------------------------------------------------------------------------------------------


class _Wanting:
    """Wants what it is told, ready after 2 s."""

    switch_s = 2.0
    wanted = Shares(0.5, 0.5)

    def shares(self, *_: object) -> Shares:
        return self.wanted


def test_a_switch_is_taken_up_by_each_lane_at_its_own_next_step() -> None:
    replica, lanes = make(kv_blocks=256), _Wanting()
    replica._lanes = lanes  # type: ignore[assignment]
    prefilled(replica, "a", 8, 50)
    replica.submit(Request("b", 400, 5, 0.0), 0.0)
    lanes.wanted = Shares(0.8, 0.3)
    assert begin(replica, DECODE, 1.0).share == 0.5, "the old workers serve until the new ones are ready"
    assert replica.switch_due_s == 3.0
    prompt = begin(replica, PREFILL, 1.5)
    assert prompt.share == 0.5
    end(replica, DECODE, 3.0)
    assert begin(replica, DECODE, 3.0).share == 0.3
    assert replica.in_progress[PREFILL].share == 0.5, "it is not stopped"
    end(replica, PREFILL, 4.0)
    assert begin(replica, PREFILL, 4.0).share == 0.8
    assert replica.switches_total == 1


# ---- the device -------------------------------------------------------------------------------------------

DECODES = StepWork((), 32, 32 * 1500, 32)
PROMPT = StepWork([(2048, 2048)], 0, 0, 1)
MIXED = StepWork([(512, 700)], 8, 9000, 9)


def roofline() -> RooflineCostModel:
    from benchmarks.effects.serving import llama_8b

    cost = llama_8b()
    assert isinstance(cost, RooflineCostModel)
    return cost


@pytest.mark.parametrize("work", [DECODES, PROMPT, MIXED])
def test_the_whole_device_alone_costs_exactly_what_the_model_says(work: StepWork) -> None:
    cost = roofline()
    device = SharedDevice(cost)
    assert device.seconds(device.load(work, 1.0)) == cost.seconds(work)
    decodes = [device.load(StepWork((), 4, 400 + 4 * step, 4), 1.0) for step in range(3)]
    assert [device.seconds(load) for load in decodes] == list(cost.decode_seconds(4, 400, 3))


@pytest.mark.parametrize("work", [DECODES, PROMPT, MIXED])
def test_the_sides_are_about_the_whole(work: StepWork) -> None:
    """The longer side of every class, added up; the smooth maximum of a product is a little more."""
    cost = roofline()
    sides = cost.sides(work)
    added_s = sides.fixed_s + sum(max(pair) for pair in sides.classes)
    assert added_s == pytest.approx(cost.seconds(work), rel=0.1)


def test_less_of_the_device_is_slower_and_decode_loses_less() -> None:
    device = SharedDevice(roofline())

    def seconds(work: StepWork, share: float) -> float:
        return device.seconds(device.load(work, share))

    for work in (DECODES, PROMPT):
        times = [seconds(work, share / 10) for share in range(1, 11)]
        assert times == sorted(times, reverse=True)
    assert seconds(DECODES, 0.5) / seconds(DECODES, 1.0) < 1.3
    assert seconds(PROMPT, 0.5) / seconds(PROMPT, 1.0) > 1.6


def test_company_costs_bandwidth_and_shares_beyond_the_device_are_cut() -> None:
    device = SharedDevice(roofline())
    decode, prompt = device.load(DECODES, 0.4), device.load(PROMPT, 0.6)
    assert device.seconds(decode, prompt) > device.seconds(decode)
    assert device.seconds(prompt, decode) >= device.seconds(prompt)
    all_of_it = device.load(DECODES, 1.0), device.load(PROMPT, 1.0)
    halves = device.load(DECODES, 0.5), device.load(PROMPT, 0.5)
    assert device.seconds(*all_of_it) == device.seconds(*halves)


def test_a_sweep_predicts_what_the_device_charges() -> None:
    cost = roofline()
    profile = sweep(cost)
    assert profile is not None
    assert profile.error_frac < 0.15
    errors = sorted(abs(predicted / seconds - 1) for predicted, seconds in points(cost, profile))
    assert errors[len(errors) * 9 // 10] < 0.3
    assert sweep(load_hardware_free()) is None


def load_hardware_free() -> Any:
    """A cost model that cannot be taken apart."""

    class Plain:
        relative_error = 0.0

        def seconds(self, work: StepWork) -> float:
            return 0.01 + 0.001 * work.rows

    return Plain()


def test_a_model_that_cannot_be_taken_apart_counts_as_arithmetic() -> None:
    device = SharedDevice(load_hardware_free())
    whole, half = (device.seconds(device.load(PROMPT, share)) for share in (1.0, 0.5))
    assert 1.5 < half / whole <= 2.0


def test_host_memory_for_kv_is_refused() -> None:
    sizes = ReplicaLimits(64, 4, 8, 64, 512, host_kv_blocks=8)
    chosen = Settings(policies=PolicySettings(lanes="static"))
    with pytest.raises(ConfigError, match="host memory"):
        make_twin(chosen, sizes, roofline(), PathCosts(), lambda outcome: None)


def test_a_fitted_model_is_taken_apart_without_a_rest() -> None:
    """Weights and KV are memory, further rows arithmetic, and together they are the whole step."""

    def seconds(work: StepWork) -> float:
        pairs = sum(new * context - new * (new - 1) / 2 for new, context in work.prefills)
        return 0.004 + 1e-4 * work.rows + 2e-7 * work.decode_context + 1e-8 * pairs

    shapes = [([(new, new)], decodes) for new in (1, 16, 64, 256) for decodes in (0, 1, 4, 9)]
    works = [StepWork(prefills, n, 300 * n, n + 1) for prefills, n in shapes]
    works += [StepWork((), n, context * n, n) for n in (1, 2, 5, 16) for context in (20, 900)]
    model = fit_steps([(work, seconds(work)) for work in works])
    for work in works:
        sides = model.sides(work)
        added_s = sides.fixed_s + sum(max(pair) for pair in sides.classes)
        assert added_s == pytest.approx(model.seconds(work), rel=1e-9)
    device = SharedDevice(model)
    decode, prompt = works[-1], StepWork([(256, 256)], 0, 0, 1)
    lost = [device.seconds(device.load(work, 0.6)) / model.seconds(work) for work in (decode, prompt)]
    assert 1.0 <= lost[0] < lost[1] < 1.7


@pytest.mark.parametrize("lanes", ["static", "none"])
@pytest.mark.parametrize("lane", ["both", 7, [], {}])
def test_a_journal_with_a_lane_that_is_none_is_refused_by_line_and_field(
    lanes: str, lane: object, tmp_path: Path
) -> None:
    first = header(ReplicaLimits(64, 4, 8, 64, 512), PolicySettings(lanes=lanes), ServiceTerms())
    row = {"call": "plan", "lane": lane, "at_s": 0.0, "plan": None}
    path = tmp_path / "journal.jsonl"
    path.write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n")
    with pytest.raises(TraceError, match="line 2, field `lane`"):
        replay_journal(path)
