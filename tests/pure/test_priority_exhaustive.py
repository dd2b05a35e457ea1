"""Every small situation of strict classes: all combinations of priorities, arrivals and sizes.

Checked from outside, with books of the test's own: a higher class never waits for a slot or for KV behind a
lower one that may be displaced; equals never swap; nobody is displaced more often than allowed, or again
right after it came back; a step displaces no more than allowed; everybody ends, with the right text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, product

import pytest
from fake_executor import FakeExecutor, expected_output

from penstock.core.events import Admitted, Finished, Preempted, ReplicaEvent, TokenOut
from penstock.core.reasons import PreemptReason, WaitReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.units import ceil_div
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

BLOCK_TOKENS = 4
SIZES = {"small": (3, 3), "long": (9, 7)}  # prompt, output
STEPS_MAX = 400
Bounds = dict[str, int]


@dataclass(frozen=True)
class Ask:
    priority: int
    size: str
    arrives: int  # before this step


@dataclass
class Watch:
    """What happened, from events alone."""

    displaced: Counter[str] = field(default_factory=Counter)  # by somebody who waited
    pairs: set[tuple[str, str]] = field(default_factory=set)  # (who yielded, to whom), of the same kind
    away: set[str] = field(default_factory=set)
    output: Counter[str] = field(default_factory=Counter)
    shield: dict[str, int] = field(default_factory=dict)
    told: dict[str, list[int]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)


def replica_of(slots: int, kv_blocks: int, bounds: Bounds) -> Replica:
    limits = ReplicaLimits(kv_blocks, BLOCK_TOKENS, slots, 16, 64, True, True)
    options = {"priority": dict(bounds)}
    return Replica(limits, make_stack(PolicySettings(rank="priority", preempt="priority", options=options)))


def run(asks: Sequence[Ask], slots: int, kv_blocks: int, bounds: Bounds) -> Watch:
    requests = [request_of(index, ask) for index, ask in enumerate(asks)]
    replica, executor, watch = replica_of(slots, kv_blocks, bounds), FakeExecutor(BLOCK_TOKENS), Watch()
    by_id = {request.id: request for request in requests}
    for step in range(STEPS_MAX):
        for request, ask in zip(requests, asks, strict=True):
            if ask.arrives == step:
                replica.submit(request, float(step))
        plan = replica.plan(float(step))
        planned = list(replica._events)
        follow(planned, watch, by_id, bounds)
        check_nobody_waits_wrongly(replica, watch, planned, bounds)
        if plan is None:
            if step > max(ask.arrives for ask in asks):
                break
            continue
        follow(
            replica.complete(plan, executor.execute(plan), step + 0.5)[len(planned) :], watch, by_id, bounds
        )
        replica.check_invariants()
    assert sorted(watch.ended) == sorted(by_id), "everybody ends"
    for request in requests:
        assert watch.told[request.id] == expected_output(request)
    return watch


def request_of(index: int, ask: Ask) -> Request:
    prompt_len, output = SIZES[ask.size]
    prompt = [index] * prompt_len  # no two share a prefix
    return Request(f"r{index}", prompt_len, output, 0.0, prompt_tokens=prompt, priority=ask.priority)


def follow(events: Sequence[ReplicaEvent], watch: Watch, by_id: dict[str, Request], bounds: Bounds) -> None:
    step_count = 0
    for event in events:
        name = event.request_id
        if isinstance(event, TokenOut):
            watch.output[name] += 1
            watch.told.setdefault(name, []).append(event.token_id)
        elif isinstance(event, Finished):
            watch.ended.append(name)
        elif isinstance(event, Admitted):
            assert event.resumed == (name in watch.away)
            if event.resumed:
                watch.away.remove(name)
                watch.shield[name] = watch.output[name] + bounds["boost_tokens"]
        elif isinstance(event, Preempted):
            watch.away.add(name)
            assert event.for_request_id is not None, "a victim is told with the one it yields to"
            mine, theirs = by_id[name].priority, by_id[event.for_request_id].priority
            if event.reason is PreemptReason.OUTRANKED:
                step_count += 1
                watch.displaced[name] += 1
                assert mine > theirs, "only a strictly lower class yields to one that waits"
                assert watch.output[name] >= watch.shield.get(name, 0), "who came back is left alone"
                assert (event.for_request_id, name) not in watch.pairs, "nobody swaps back"
                watch.pairs.add((name, event.for_request_id))
            else:
                assert mine >= theirs, "nobody yields to a lower class"
    assert step_count <= bounds["step_max"]
    assert all(count <= bounds["request_max"] for count in watch.displaced.values())


def check_nobody_waits_wrongly(
    replica: Replica, watch: Watch, planned: Sequence[ReplicaEvent], bounds: Bounds
) -> None:
    head = next(iter(replica.waiting), None)
    reason = replica._head_reason
    if head is None or reason not in (WaitReason.SLOTS, WaitReason.KV_CAPACITY):
        return
    outranked = [event for event in planned if isinstance(event, Preempted)]
    if outranked and (
        outranked[-1].reason is not PreemptReason.OUTRANKED or len(outranked) >= bounds["step_max"]
    ):
        return  # nobody is admitted in a step in which KV ran out, and a step displaces only so many
    lower = [
        each
        for each in replica.running
        if each.request.priority > head.request.priority
        and watch.displaced[each.request.id] < bounds["request_max"]
        and watch.output[each.request.id] >= watch.shield.get(each.request.id, 0)
    ]
    if reason is WaitReason.SLOTS:
        assert not lower, f"{head} waits for a slot of a lower class"
        return
    needed = ceil_div(head.total_len, BLOCK_TOKENS)
    watermark = int(0.01 * replica.block_count)
    freed = replica.blocks_available + sum(each.block_count for each in lower) - watermark
    assert not lower or freed < needed, f"{head} waits for KV of a lower class"


STRICT: Bounds = {"step_max": 8, "request_max": 1 << 20, "boost_tokens": 0}
BOUNDED: Bounds = {"step_max": 1, "request_max": 2, "boost_tokens": 2}
NEVER: Bounds = {"step_max": 1, "request_max": 0, "boost_tokens": 0}


def all_asks(
    count: int, priorities: Sequence[int], sizes: Sequence[str], instants: Sequence[int]
) -> Iterator[list[Ask]]:
    for arrives in combinations_with_replacement(instants, count):
        for classes in product(priorities, repeat=count):
            for kinds in product(sizes, repeat=count):
                yield [Ask(*ask) for ask in zip(classes, kinds, arrives, strict=True)]


@pytest.mark.parametrize("bounds", [STRICT, BOUNDED], ids=["strict", "bounded"])
@pytest.mark.parametrize(("slots", "kv_blocks"), [(1, 16), (2, 16), (2, 6), (3, 8)])
def test_three_requests_in_every_combination(slots: int, kv_blocks: int, bounds: Bounds) -> None:
    displaced = 0
    for asks in all_asks(3, (0, 1, 2), ("small", "long"), (0, 3)):
        displaced += sum(run(asks, slots, kv_blocks, bounds).displaced.values())
    assert displaced > 10, "the cases are not empty"


@pytest.mark.parametrize(("slots", "kv_blocks"), [(2, 16), (3, 8)])
def test_four_requests_of_two_classes(slots: int, kv_blocks: int) -> None:
    for asks in all_asks(4, (0, 1), ("long",), (0, 1, 3)):
        run(asks, slots, kv_blocks, BOUNDED)


@pytest.mark.parametrize("request_max", [1, 9])
def test_a_low_request_among_three_high_ones_at_every_instant(request_max: int) -> None:
    """Comes back, is left alone for a while, is displaced again, and no more often than allowed."""
    bounds = {"step_max": 1, "request_max": request_max, "boost_tokens": 3}
    most = 0
    for arrives in combinations_with_replacement(range(1, 14), 3):
        asks = [Ask(1, "long", 0), *(Ask(0, "small", each) for each in arrives)]
        most = max(most, run(asks, 1, 16, bounds).displaced["r0"])
    assert most == min(request_max, 2)


@pytest.mark.parametrize(("slots", "kv_blocks"), [(1, 16), (2, 16), (2, 6), (3, 8)])
def test_equals_never_displace_each_other(slots: int, kv_blocks: int) -> None:
    for asks in all_asks(4, (0,), ("small", "long"), (0, 3)):
        assert not run(asks, slots, kv_blocks, STRICT).displaced


def test_a_request_that_may_never_be_displaced_is_not() -> None:
    for asks in all_asks(3, (0, 1, 2), ("small", "long"), (0, 2)):
        assert not run(asks, 1, 16, NEVER).displaced
