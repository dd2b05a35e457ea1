"""Ranks by class, deadline and predicted work: their keys, and who may displace whom."""

from __future__ import annotations

import pytest
from fake_executor import make_replica
from one_server import Standing

from penstock.core.errors import ConfigError
from penstock.core.metrics import Slo
from penstock.core.reasons import FinishReason, WaitReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.policies.base import NoOptions
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.estimate.lengths import LengthBelief
from penstock.policies.rank.edf import EarliestDeadline
from penstock.policies.rank.fcfs import Fcfs
from penstock.policies.rank.priority import Priority, PriorityOptions
from penstock.policies.rank.shortest_predicted import ShortestOptions, ShortestPredicted
from penstock.policies.stack import make_stack, rank_class
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica


def standing(index: int, arrival_s: float = 0.0, prompt_len: int = 10, **fields: object) -> Standing:
    request = Request(f"r{index}", prompt_len, 100, arrival_s, **fields)  # type: ignore[arg-type]
    return Standing(request, index, arrival_s)


# ---- priority -------------------------------------------------------------------------------------------


def test_lower_values_go_first_and_equals_never_swap() -> None:
    rank = Priority(Context(), PriorityOptions())
    high, low, other = standing(0, priority=-1), standing(1, priority=2), standing(2, priority=2)
    assert rank.key(high, 0.0) < rank.key(low, 0.0)
    assert rank.outranks(high, low, 0.0) and not rank.outranks(low, high, 0.0)
    assert not rank.outranks(other, low, 0.0) and not rank.outranks(low, other, 0.0)


def test_a_class_adds_its_priority() -> None:
    rank = Priority(Context(), PriorityOptions(("interactive=-5", "batch = 10")))
    keys = [
        rank.key(standing(i, slo_class=c, priority=1), 0.0)
        for i, c in enumerate(("interactive", "batch", "x"))
    ]
    assert keys == [(-4,), (11,), (1,)]


@pytest.mark.parametrize("entry", ["batch", "batch=", "=3", "batch=high"])
def test_a_class_that_is_no_pair_is_refused(entry: str) -> None:
    policies = PolicySettings(rank="priority", options={"priority": {"classes": [entry]}})
    with pytest.raises(ConfigError, match="NAME=NUMBER"):
        make_stack(policies)


def test_a_class_has_one_priority() -> None:
    policies = PolicySettings(rank="priority", options={"priority": {"classes": ["batch=1", "batch=2"]}})
    with pytest.raises(ConfigError, match=r"`batch=2`, which names a class twice"):
        make_stack(policies)


def test_options_of_both_slots_share_a_table_and_typos_are_found() -> None:
    table = {"classes": ["batch=1"], "step_max": 2}
    make_stack(PolicySettings(rank="priority", preempt="priority", options={"priority": table}))
    with pytest.raises(ConfigError, match="step_mox"):
        make_stack(PolicySettings(rank="priority", preempt="priority", options={"priority": {"step_mox": 2}}))


def test_only_ranks_by_priority_read_it() -> None:
    assert rank_class("priority").reads_priority
    assert not any(rank_class(name).reads_priority for name in ("fcfs", "edf", "vtc", "uwfq"))


def test_nobody_displaces_under_first_come() -> None:
    rank = Fcfs(Context(), NoOptions())
    assert not rank.outranks(standing(0), standing(1), 0.0)


# ---- deadlines ------------------------------------------------------------------------------------------

SLOS = {
    "chat": Slo(ttft_ms=500.0, tpot_ms=50.0),
    "batch": Slo(e2e_ms=60_000.0),
    "both": Slo(ttft_ms=1000.0, e2e_ms=9000.0),
}


def test_the_deadline_is_the_next_promise() -> None:
    rank = EarliestDeadline(Context(ServiceTerms(SLOS)), NoOptions())
    chat, batch, both = (standing(i, 2.0, slo_class=name) for i, name in enumerate(("chat", "batch", "both")))
    nothing, own = standing(3, 2.0), standing(4, 2.0, slo_class="chat", slo=Slo(ttft_ms=100.0))
    assert [rank.key(each, 9.0)[0] for each in (chat, batch, both, own)] == [2.5, 62.0, 3.0, 2.1]
    assert rank.key(nothing, 9.0) > rank.key(batch, 9.0)
    version = rank.version(0.0)
    for each in (chat, batch, both, nothing):
        each.first_token_s = 2.4
        rank.decoding(each, 2.4)
    assert rank.version(0.0) > version
    assert [rank.key(each, 9.0)[0] for each in (chat, batch, both)] == [
        pytest.approx(2.4 + 99 * 0.05),
        62.0,
        11.0,
    ]
    assert not rank.outranks(nothing, standing(5), 0.0), "none of those without a deadline is more urgent"


# ---- predicted work -------------------------------------------------------------------------------------


def learned(tokens: int, options: ShortestOptions | None = None) -> ShortestPredicted:
    """Everybody so far produced `tokens`."""
    context = Context()
    belief = context.shared(LengthBelief)
    for index in range(300):
        belief.learn(standing(index).request, tokens)
    return ShortestPredicted(context, options or ShortestOptions())


def submit(rank: ShortestPredicted, *sequences: Standing) -> None:
    for sequence in sequences:
        rank.submitted(sequence, sequence.submitted_s)


def test_work_is_the_prompt_and_what_others_produced() -> None:
    rank = learned(20)
    short, long = standing(0, prompt_len=5), standing(1, prompt_len=50)
    submit(rank, short, long)
    assert rank.key(short, 0.0) == (5 + 2 * 20,) and rank.key(long, 0.0) == (50 + 2 * 20,)


def test_ageing_is_a_handicap_for_those_who_come_later() -> None:
    rank = learned(20, ShortestOptions(ageing_tokens_per_s=10.0))
    long, short = standing(0, 0.0, prompt_len=50), standing(1, 5.0, prompt_len=5)
    submit(rank, long, short)
    assert rank.key(long, 99.0) < rank.key(short, 99.0), "45 tokens shorter, 50 tokens later"


def test_what_runs_only_gets_shorter() -> None:
    rank = learned(40, ShortestOptions(swap_margin_frac=0.5))
    running, waiting = standing(0, prompt_len=300), standing(1, prompt_len=10)
    submit(rank, running, waiting)
    assert rank.outranks(waiting, running, 0.0) and not rank.outranks(running, waiting, 0.0)
    running.is_decoding, running.computed_len, running.output_len = True, 300, 1
    assert not rank.outranks(waiting, running, 0.0), "its prompt is done: 78 are left, against 90"
    key = rank.key(running, 0.0)
    running.output_len = 60
    assert rank.key(running, 0.0) == key and not rank.outranks(waiting, running, 0.0)


def test_preempted_work_is_judged_anew() -> None:
    rank = learned(40)
    sequence = standing(0, prompt_len=10)
    submit(rank, sequence)
    sequence.output_len = 30
    rank.left(sequence, 1.0)
    again, left = 10 + 30, 40 - 30
    assert rank.key(sequence, 1.0)[0] == pytest.approx(again + 2 * left, rel=0.05)
    sequence.output_len = 100
    rank.left(sequence, 2.0)
    rank.finished(sequence, FinishReason.LENGTH, 2.0)
    assert not rank._keys and not rank._predicted


# ---- in a replica ---------------------------------------------------------------------------------------


def test_priorities_order_the_queue_of_a_replica() -> None:
    replica = make_replica(rank="priority", running_max=1)
    for index, priority in enumerate((1, 0, -1, 0)):
        prompt = [index] * 6
        replica.submit(Request(f"r{index}", 6, 2, 0.0, prompt_tokens=prompt, priority=priority), 0.0)
    plan = replica.plan(0.0)
    assert plan is not None and [start.request_id for start in plan.starts] == ["r2"]
    assert [sequence.request.id for sequence in replica.waiting] == ["r1", "r3", "r0"]
    assert replica.stats().waiting_by_reason[WaitReason.SLOTS.value] == 1


def test_within_one_step_the_turn_goes_round_the_tenants() -> None:
    """Each admission charges its tenant, so the next is of another."""
    limits = ReplicaLimits(64, 4, 4, 64, 64, True, True)
    replica = Replica(limits, make_stack(PolicySettings(rank="vtc")))
    for index, tenant in enumerate("aaaabbbb"):
        replica.submit(Request(f"{tenant}{index}", 8, 4, 0.0, tenant=tenant), 0.0)
    plan = replica.plan(0.0)
    assert plan is not None and [start.request_id for start in plan.starts] == ["a0", "b4", "a1", "b5"]
