"""Random loads on replicas with host memory: KV is where it should be through every swap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fake_executor import FakeExecutor, expected_output, make_replica
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished, ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.step import Copy, Direction
from penstock.replica.extents import Extents, runs_of

BLOCK = 4


@dataclass(frozen=True)
class Load:
    """Turns of one session follow each other: each prompt begins with what was said before."""

    requests: list[Request]
    submit_at: list[int]
    cancel_at: dict[str, int]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    requests: list[Request] = []
    submit_at: list[int] = []
    cancel_at: dict[str, int] = {}
    for session in range(draw(st.integers(1, 4))):
        history: list[int] = []
        step = draw(st.integers(0, 6))
        for turn in range(draw(st.integers(1, 3))):
            own = draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
            is_same = draw(st.integers(0, 5)) > 0  # else the client has changed what was said
            prompt = [*(history if is_same else history[::-1]), *own][-34:]
            request = Request(
                f"r{session}.{turn}",
                len(prompt),
                draw(st.integers(1, 14)),
                0.0,
                prompt_tokens=prompt,
                stop_token_ids=frozenset(draw(st.sets(st.integers(0, 999), max_size=25))),
                session_id=draw(st.sampled_from([f"s{session}", f"s{session}", "s", None])),
                tenant=draw(st.sampled_from(["a", "b"])),
                is_last_turn=draw(st.integers(0, 5)) == 0,
            )
            requests.append(request)
            submit_at.append(step)
            if draw(st.integers(0, 6)) == 0:
                cancel_at[request.id] = step + draw(st.integers(0, 20))
            step += draw(st.integers(0, 40))
            history = [*prompt, *expected_output(request)]
    order = sorted(range(len(requests)), key=lambda index: submit_at[index])
    return Load([requests[i] for i in order], [submit_at[i] for i in order], cancel_at)


systems = st.fixed_dictionaries(
    {
        "kv_blocks": st.integers(13, 28),
        "host_kv_blocks": st.sampled_from([1, 3, 8, 20, 200]),
        "kv_group_tokens": st.sampled_from([0, 4, 12, 40]),
        "running_max": st.integers(1, 5),
        "step_tokens_max": st.integers(1, 24),
        "prefix_cache": st.booleans(),
        "compose": st.sampled_from(["sarathi", "prefill-first"]),
        "rank": st.sampled_from(["fcfs", "fastswitch"]),
        "preempt": st.sampled_from(["swap", "fastswitch"]),
        "options": st.fixed_dictionaries(
            {
                "fastswitch": st.fixed_dictionaries(
                    {
                        "interval_steps": st.sampled_from([1, 3, 8]),
                        "mode": st.sampled_from(["random", "markov", "least-served"]),
                        "batch_min": st.sampled_from([1, 2]),
                        "beside": st.booleans(),
                        "reuse": st.booleans(),
                        "turns": st.booleans(),
                    }
                )
            }
        ),
    }
)


def drive(
    load: Load, system: dict[str, Any], repeat: bool, copy_steps: int = 1, fails: frozenset[int] = frozenset()
) -> tuple[list[ReplicaEvent], FakeExecutor]:
    replica = make_replica(repeat=repeat, **system)
    executor = FakeExecutor(BLOCK, copy_steps, lambda copy: copy.copy_id in fails)
    events: list[ReplicaEvent] = []
    last = max(load.submit_at)
    for step in range(4_000):
        for request, due in zip(load.requests, load.submit_at, strict=True):
            if due == step:
                replica.submit(request, float(step))
        for name, due in load.cancel_at.items():
            finished = replica.cancel(name, CancelReason.ADMIN, float(step)) if due == step else None
            events += [finished] if finished else []
        plan = replica.plan(float(step))
        if plan is None and step > last + 25:
            assert not replica.has_work
            stats = replica.stats()
            assert stats.kv_blocks_used == 0
            assert not system["kv_group_tokens"] or not replica._pool._extents._tails, "nobody has a tail"
            assert sum(stats.swap_blocks_total.values()) == sum(copy.block_count for copy in executor.copies)
            return events, executor
        if plan is not None:
            check_guards(plan.copies, replica)
            events += replica.complete(plan, executor.execute(plan), step + 0.5)
        replica.check_invariants()
    raise AssertionError("the load never finished")


def check_guards(copies: Any, replica: Any) -> None:
    for copy in copies:
        devices = [device + i for device, _, count in copy.extents for i in range(count)]
        hosts = [host + i for _, host, count in copy.extents for i in range(count)]
        assert len(set(devices)) == len(devices) and len(set(hosts)) == len(hosts)
        assert all(0 <= block < replica.limits.kv_blocks for block in devices)
        assert all(0 <= block < replica.limits.host_kv_blocks for block in hosts)


def check_outputs(load: Load, events: list[ReplicaEvent]) -> None:
    ends = {event.request_id: event for event in events if isinstance(event, Finished)}
    assert len(ends) == len(load.requests) == sum(isinstance(event, Finished) for event in events)
    for request in load.requests:
        told = [e.token_id for e in events if isinstance(e, TokenOut) and e.request_id == request.id]
        expected = expected_output(request)
        if ends[request.id].reason is FinishReason.CANCELLED:
            assert told == expected[: len(told)]
        else:
            assert told == expected


@given(loads(), systems, st.integers(1, 6), st.frozensets(st.integers(0, 30), max_size=6))
@settings(max_examples=300, deadline=None)
def test_outputs_are_right_through_swaps(
    load: Load, system: dict[str, Any], copy_steps: int, fails: frozenset[int]
) -> None:
    events, _ = drive(load, system, True, copy_steps, fails)
    check_outputs(load, events)


@given(loads(), systems, st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_standing_plans_change_nothing(load: Load, system: dict[str, Any], copy_steps: int) -> None:
    with_repeat, first = drive(load, system, True, copy_steps)
    without, second = drive(load, system, False, copy_steps)
    assert with_repeat == without
    assert first.copies == second.copies


@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.booleans()), max_size=60),
)
@settings(max_examples=300, deadline=None)
def test_extents_partition_the_pool(count: int, group: int, moves: list[tuple[int, int, bool]]) -> None:
    extents = Extents(count, group)
    held: dict[int, list[int]] = {}
    for owner, wanted, takes in moves:
        if takes:
            held.setdefault(owner, []).extend(extents.take(min(wanted, extents.count), owner))
        elif owner in held:
            extents.give(held.pop(owner))
            extents.drop_tail(owner)
        extents.check_invariants()
        taken = [block for blocks in held.values() for block in blocks]
        assert len(set(taken)) == len(taken), "no block is given twice"
        assert not extents.free_blocks() & set(taken)
        assert len(taken) + extents.count == count, "nothing is lost"


def test_a_lone_owner_gets_one_run() -> None:
    extents = Extents(1024, 16)
    assert runs_of(extents.take(5, "a") + extents.take(20, "b")) == [(0, 5), (16, 20)]
    blocks = extents.take(6, "a")
    assert runs_of(blocks) == [(5, 6)], "its blocks go on where they ended, though another came between"


def test_a_cut_tail_leaves_its_owner_half() -> None:
    extents = Extents(1024, 1024)
    assert extents.take(4, "a") == [0, 1, 2, 3] and runs_of(extents.take(1001, "b")) == [(19, 1001)]
    extents.give(range(19, 20))
    extents.check_invariants()
    rest = extents.take(14, "c")
    assert extents.take(1, "a") == [4], "it goes on where it was"
    assert len(rest) == 14 and extents.count == 5


def test_a_copy_says_its_blocks() -> None:
    assert Copy(0, 0, Direction.OUT, ((3, 9, 4), (1, 2, 1))).block_count == 5
