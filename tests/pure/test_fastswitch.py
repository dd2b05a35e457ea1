"""Host memory's books, the modelled link, and the decisions of swap and FastSwitch on small views."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_executor import FakeExecutor, expected_output, make_replica

from penstock.core.config import resolve
from penstock.core.errors import ConfigError
from penstock.core.events import Finished, Preempted, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import Copy, CopyDone, Direction
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.preempt import PREEMPT, CopySize, Manner
from penstock.policies.rank import RANK
from penstock.policies.rank.fastswitch import TENANTS_MAX
from penstock.policies.stack import load_preset, make_stack
from penstock.policies.view import CopyFacts, StepFacts
from penstock.replica.host_tier import HostTier
from penstock.replica.sequence import Sequence
from penstock.twin.host_link import HostLink


@dataclass
class Running:
    """As much of a running sequence as these policies read."""

    output_left: int = 100
    total_len: int = 500
    arrival_index: int = 0


@dataclass
class View:
    running: list[Running] = field(default_factory=list)
    block_tokens: int = 16


def policy(name: str = "fastswitch", **options: Any) -> Any:
    return PREEMPT.make(name, Context(), options)


class Times:
    """`StepTimes` that knows: a decode step 10 ms, a prompt token 1 ms."""

    is_ready = True

    def seconds(self, rows: int, samples: int, context: int, pairs: float) -> float:
        return 0.01 if rows <= 64 else rows * 1e-3


def knowing(block_s: float, **options: Any) -> Any:
    made = policy(**options)
    made._steps = Times()
    made._copies.copied(CopyFacts(True, 10, 2, 10 * block_s), 0.0)
    return made


# ---- the manner of a swap ---------------------------------------------------------------------------------


def test_swap_always_waits_and_copies_single_blocks() -> None:
    swap = policy("swap")
    assert swap.swap_out(Running(), CopySize(100, 7, 0), View(), 0.0) is Manner.SWAP
    assert swap.swap_in_waits(Running(), CopySize(100, 7, 0), View(), 0.0)
    assert swap.swaps and not swap.copies_runs and not swap.keeps_copies


def test_out_and_in_against_computing_again() -> None:
    """1,000 tokens take a second to compute; 63 blocks out and back take 126 copies of a block."""
    others = View([Running() for _ in range(4)])
    size = CopySize(1000, 63, 0)
    assert knowing(0.0075).swap_out(Running(), size, others, 0.0) is not Manner.RECOMPUTE
    assert knowing(0.0085).swap_out(Running(), size, others, 0.0) is Manner.RECOMPUTE
    assert knowing(0.0085).swap_out(Running(), CopySize(1000, 3, 0), others, 0.0) is not Manner.RECOMPUTE, (
        "what the host has already is not copied again"
    )


def test_a_copy_goes_beside_steps_that_hide_it() -> None:
    size = CopySize(320, 20, 0)  # 0.1 s at 5 ms a block: ten steps of the others
    made = knowing(0.005)
    assert made.swap_out(Running(), size, View([Running(11)] * 3), 0.0) is Manner.SWAP_BESIDE
    assert made.swap_out(Running(), size, View([Running(11), Running(9)]), 0.0) is Manner.SWAP
    assert made.swap_out(Running(), size, View([Running()]), 0.0) is Manner.SWAP, "a near-empty batch waits"
    assert not made.swap_in_waits(Running(), size, View([Running(11)] * 2), 0.0)
    assert made.swap_in_waits(Running(), size, View([]), 0.0)
    assert knowing(0.005, beside=False).swap_in_waits(Running(), size, View([Running()] * 9), 0.0)


def test_nobody_is_displaced_before_it_had_a_token() -> None:
    """Priorities that change with every step would otherwise stop everybody for ever."""
    options = {"fastswitch": {"mode": "random", "interval_steps": 1}}
    replica = make_replica(
        kv_blocks=12,
        running_max=2,
        host_kv_blocks=40,
        rank="fastswitch",
        preempt="fastswitch",
        options=options,
    )
    requests = [Request(f"r{i}", 9, 12, 0.0, prompt_tokens=[i] * 9) for i in range(6)]
    told, steps = run(replica, FakeExecutor(4, copy_steps=5), requests)
    assert all(told[request.id] == expected_output(request) for request in requests) and steps < 600


def run(replica: Any, executor: FakeExecutor, requests: list[Request]) -> tuple[dict[str, list[int]], int]:
    told: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        replica.submit(request, 0.0)
    for step in range(5_000):
        plan = replica.plan(float(step))
        if plan is None:
            return told, step
        for event in replica.complete(plan, executor.execute(plan), step + 0.5):
            if isinstance(event, TokenOut):
                told[event.request_id].append(event.token_id)
        replica.check_invariants()
    raise AssertionError("never ends")


# ---- what the host keeps ----------------------------------------------------------------------------------


def test_bytes_fall_on_the_second_preemption() -> None:
    """The card's tell of a toy: everything copied again at each swap-out."""
    sizes: dict[bool, list[int]] = {}
    for reuse in (True, False):
        options = {"fastswitch": {"mode": "random", "interval_steps": 4, "reuse": reuse}}
        replica = make_replica(
            kv_blocks=24, running_max=2, host_kv_blocks=200, prefix_cache=False, rank="fastswitch",
            preempt="fastswitch", options=options,
        )  # fmt: skip
        executor = FakeExecutor(4)
        requests = [Request(f"r{i}", 40, 30, 0.0, prompt_tokens=[i] * 40) for i in range(4)]
        run(replica, executor, requests)
        outs = [copy for copy in executor.copies if copy.direction is Direction.OUT]
        seen: Counter[int] = Counter()
        again = []
        for copy in outs:
            if seen[copy.seq_id]:
                again.append(copy.block_count)
            seen[copy.seq_id] += 1
        sizes[reuse] = again
    assert sizes[True] and max(sizes[True]) <= 4 < 10 <= min(sizes[False])


def test_the_next_turn_finds_its_history() -> None:
    replica = make_replica(kv_blocks=30, host_kv_blocks=60, prefix_cache=False, preempt="fastswitch")
    executor = FakeExecutor(4)
    first = Request("a", 10, 6, 0.0, prompt_tokens=[1] * 10, session_id="s")
    told, _ = run(replica, executor, [first])
    history = [*[1] * 10, *told["a"]]
    again = Request("b", 20, 5, 0.0, prompt_tokens=[*history, *[2] * 4], session_id="s")
    other = Request("c", 20, 5, 0.0, prompt_tokens=[*history, *[2] * 4], session_id="s", tenant="other")
    told, _ = run(replica, executor, [again, other])
    assert told["b"] == expected_output(again) == told["c"]
    loads = [copy for copy in executor.copies if copy.direction is Direction.IN]
    assert len(loads) == 1 and loads[0].block_count == 3, "15 tokens have KV: three full blocks of four"


def sequence(number: int, length: int, session: str | None = None) -> Sequence:
    request = Request(f"r{number}", length, 10, 0.0, prompt_tokens=[number] * length, session_id=session)
    return Sequence(number, request, 0.0)


def test_ends_of_lower_ranked_copies_go_first() -> None:
    tier = HostTier(10, 4, 1)
    low, high, mine = sequence(3, 16), sequence(1, 16), sequence(2, 16)
    for each in (low, high):
        copy, length = tier.reserve(each, 16, lambda s: s.arrival_index)
        assert length == 16
        copy.valid_len = 16
    assert tier.room_for(mine, 16, lambda s: s.arrival_index) == 16
    _, length = tier.reserve(mine, 16, lambda s: s.arrival_index)
    low_copy, high_copy = tier.copy_of(low), tier.copy_of(high)
    assert length == 16 and low_copy is not None and high_copy is not None
    assert low_copy.valid_len == 8 and high_copy.valid_len == 16, "v falls to the first lost block"
    assert tier.reserve(sequence(0, 40), 40, lambda s: s.arrival_index)[1] == 40
    assert not any(map(tier.copy_of, (low, high, mine))) and tier.used_count == 10
    tier.check_invariants()


def test_a_full_host_takes_nothing_from_better_ranked_ones() -> None:
    tier = HostTier(4, 4, 1)
    copy, _ = tier.reserve(sequence(1, 16), 16, lambda s: s.arrival_index)
    copy.valid_len = 16
    assert tier.room_for(sequence(2, 16), 16, lambda s: s.arrival_index) == 0


def test_a_failed_load_is_computed_again() -> None:
    options = {"fastswitch": {"mode": "random", "interval_steps": 3, "batch_min": 1}}
    replica = make_replica(
        kv_blocks=14, running_max=3, host_kv_blocks=60, prefix_cache=False, rank="fastswitch",
        preempt="fastswitch", options=options,
    )  # fmt: skip
    executor = FakeExecutor(4, copy_steps=2, fails=lambda copy: copy.direction is Direction.IN)
    requests = [Request(f"r{i}", 12, 12, 0.0, prompt_tokens=[i] * 12) for i in range(5)]
    told, _ = run(replica, executor, requests)
    stats = replica.stats()
    assert all(told[request.id] == expected_output(request) for request in requests)
    assert stats.swap_failures_total > 0 and stats.preempted_tokens_total["kv_lost"] > 0


def test_a_load_that_is_cancelled_gives_its_tail_back() -> None:
    """The unfilled rest of its last group is lent to nobody, and the next group is whole again."""
    options = {"fastswitch": {"mode": "random", "interval_steps": 3, "batch_min": 1}}
    replica = make_replica(
        kv_blocks=40, running_max=2, host_kv_blocks=60, kv_group_tokens=32, prefix_cache=False,
        rank="fastswitch", preempt="fastswitch", options=options,
    )  # fmt: skip
    executor = FakeExecutor(4, copy_steps=3)
    for index in range(4):
        replica.submit(Request(f"r{index}", 12, 30, 0.0, prompt_tokens=[index] * 12), 0.0)
    while not replica._swapping.loading:
        plan = replica.plan(float(len(executor.plans)))
        assert plan is not None
        replica.complete(plan, executor.execute(plan), len(executor.plans) + 0.5)
    (loading,) = replica._swapping.loading.values()
    for request_id in list(replica._by_request):
        replica.cancel(request_id, CancelReason.ADMIN, 1e3)
    assert loading.request.id not in replica._by_request and not replica._pool._extents._tails
    replica.check_invariants()


def test_a_cancel_is_ranked_at_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stopped answer leaves on a full host goes before lower-ranked copies, as ranks are by then."""
    replica = make_replica(kv_blocks=30, host_kv_blocks=1, prefix_cache=False, preempt="fastswitch")
    executor, asked_s = FakeExecutor(4), []
    replica.submit(Request("a", 10, 6, 0.0, prompt_tokens=[1] * 10, session_id="s"), 0.0)
    plan = replica.plan(0.0)
    replica.complete(plan, executor.execute(plan), 0.5)
    rank = replica._stack.rank
    monkeypatch.setattr(type(rank), "key", lambda self, sequence, now_s: asked_s.append(now_s) or (0,))
    replica.cancel("a", CancelReason.STOP_STRING, 7.0)
    assert asked_s and set(asked_s) == {7.0}


def test_without_host_memory_the_victim_is_computed_again() -> None:
    replica = make_replica(kv_blocks=9, preempt="swap", prefix_cache=False)
    requests = [Request(f"r{i}", 8, 12, 0.0, prompt_tokens=[i] * 8) for i in range(3)]
    told, _ = run(replica, FakeExecutor(4), requests)
    assert all(told[request.id] == expected_output(request) for request in requests)
    assert replica.stats().preempted_tokens_total["kv_exhausted"] > 0


def test_swapped_time_counts_as_preempted() -> None:
    replica = make_replica(kv_blocks=9, host_kv_blocks=30, preempt="swap", prefix_cache=False)
    requests = [Request(f"r{i}", 8, 12, 0.0, prompt_tokens=[i] * 8) for i in range(3)]
    for request in requests:
        replica.submit(request, 0.0)
    executor, events = FakeExecutor(4), []
    while (plan := replica.plan(now_s := float(len(executor.plans)))) is not None:
        events += replica.complete(plan, executor.execute(plan), now_s + 0.5)
    preempted = [event for event in events if isinstance(event, Preempted)]
    assert preempted and all(event.tokens_lost == 0 for event in preempted)
    ends = {event.request_id: event for event in events if isinstance(event, Finished)}
    for event in preempted:
        assert ends[event.request_id].phases.preempted_s > 0.0
    assert all(end.phases.total_s == pytest.approx(end.at_s) for end in ends.values())


# ---- the link of the twin ---------------------------------------------------------------------------------


def test_the_link_prices_transfers_and_bytes_in_turn() -> None:
    link = HostLink(block_bytes=1000, layers=4, launch_s=0.01, bytes_per_s=10_000)
    link.begin(
        [Copy(0, 0, Direction.OUT, ((0, 0, 5), (9, 9, 1))), Copy(1, 1, Direction.IN, ((2, 2, 1),))], [], 1.0
    )
    assert link.next_s == pytest.approx(1.0 + 8 * 0.01 + 0.6)
    assert link.take(1.67) == []
    (done,) = link.take(1.69)
    assert done == CopyDone(0, done.seconds) and done.seconds == pytest.approx(0.68)
    assert link.done_s([1]) == pytest.approx(1.68 + 0.04 + 0.1), "one queue for both ways"
    assert [done.copy_id for done in link.take(9.0)] == [1] and link.next_s == float("inf")


# ---- priorities that change -------------------------------------------------------------------------------


def rank(terms: ServiceTerms | None = None, **options: Any) -> Any:
    return RANK.make("fastswitch", Context(terms), options)


def step(made: Any, steps: int) -> None:
    made.stepped(StepFacts((), 1, 10, steps, 0.1), 0.0)


@pytest.mark.parametrize("mode", ["random", "markov"])
def test_drawn_priorities_hold_until_the_next_update(mode: str) -> None:
    made = rank(mode=mode, interval_steps=10, stay=0.3)
    some = [sequence(number, 4, f"s{number}") for number in range(40)]
    before = [made.key(each, 0.0) for each in some]
    step(made, 9)
    assert made.version(0.0) == 0 and [made.key(each, 0.0) for each in some] == before
    assert made.steps_valid(None, 0.0) == 1
    step(made, 1)
    after = [made.key(each, 0.0) for each in some]
    assert made.version(0.0) == 1 and made.steps_valid(None, 0.0) == 10 and after != before
    assert len(set(before)) > 4
    if mode == "markov":
        assert all(abs(a[0] - b[0]) <= 1 for a, b in zip(after, before, strict=True)), "one level a move"


def test_draws_follow_the_seed_and_nothing_else() -> None:
    some = [sequence(number, 4, f"s{number}") for number in range(10)]
    first, again, other = (rank(ServiceTerms(seed=seed), mode="random") for seed in (1, 1, 2))
    keys = [first.key(each, 0.0) for each in some]
    assert [again.key(each, 5.0) for each in reversed(some)] == keys[::-1]
    assert [other.key(each, 0.0) for each in some] != keys


def test_a_chain_does_not_depend_on_how_often_it_is_asked() -> None:
    often, seldom = rank(mode="markov", interval_steps=1), rank(mode="markov", interval_steps=1)
    one = sequence(0, 4, "s")
    for made in (often, seldom):
        made.key(one, 0.0)
    for _ in range(20):
        step(often, 1)
        often.key(one, 0.0)
    step(seldom, 20)
    assert often.key(one, 0.0) == seldom.key(one, 0.0)


def test_the_least_served_tenant_goes_first_by_weight() -> None:
    made = rank(ServiceTerms(tenant_weights={"big": 4.0}), interval_steps=5)
    some = {}
    for number, (tenant, output) in enumerate([("big", 300), ("small", 100)]):
        request = Request(f"r{number}", 50, 500, 0.0, tenant=tenant)
        each = some[tenant] = Sequence(number, request, 0.0)
        made.submitted(each, 0.0)
        each.known_len += output
    assert made.key(some["big"], 0.0) == made.key(some["small"], 0.0), "nothing moves between updates"
    step(made, 5)
    assert made.key(some["big"], 0.0)[0] == 350 / 4 < made.key(some["small"], 0.0)[0] == 150


def test_tenants_are_remembered_up_to_a_number_those_served_most() -> None:
    made = rank(memory=1.0, interval_steps=1)
    others = [f"t{number}" for number in range(TENANTS_MAX)]
    for number, tenant in enumerate([*others, "most"]):
        each = Sequence(number, Request(f"r{number}", 50, 500, 0.0, tenant=tenant), 0.0)
        made.submitted(each, 0.0)
        each.known_len += 300 if tenant == "most" else 1
        made.finished(each, FinishReason.LENGTH, 0.0)
    step(made, 2)
    requests = [Request("asked", 4, 10, 0.0, tenant=tenant) for tenant in [*others, "most"]]
    shares = [made.key(Sequence(0, each, 0.0), 0.0)[0] for each in requests]
    assert shares == [51.0] * (TENANTS_MAX - 1) + [0.0, 350.0]


def test_wrong_options_and_lanes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="fastswitch.mode"):
        rank(mode="luck")
    with pytest.raises(ConfigError, match="copies of KV"):
        make_stack(PolicySettings(preempt="fastswitch", lanes="static"))


def test_the_preset_is_whole() -> None:
    settings = resolve(
        file_text="", file_name="x", environ={}, flags={"preset": "fastswitch"}, load_preset=load_preset
    ).settings
    assert (settings.policies.rank, settings.policies.preempt) == ("fastswitch", "fastswitch")
    assert settings.replica.kv_group_tokens == 960 and settings.replica.host_kv_memory == "auto"
