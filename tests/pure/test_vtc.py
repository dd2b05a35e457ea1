"""Virtual token counters: what is charged and when, the lift, the order, the paper's bound in a replica."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_executor import FakeExecutor
from hypothesis import given, settings
from hypothesis import strategies as st
from one_server import Standing

from penstock.core.events import Finished
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.rank.vtc import IDLE_TENANTS_MAX, VirtualTokenCounters, VtcOptions
from penstock.policies.stack import make_stack
from penstock.policies.view import StepFacts
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica


class Scene:
    """Calls the policy as a replica would."""

    def __init__(self, options: VtcOptions | None = None, **weights: float) -> None:
        self.vtc = VirtualTokenCounters(
            Context(ServiceTerms(tenant_weights=weights)), options or VtcOptions()
        )
        self.count = 0

    def submit(self, tenant: str, prompt_len: int = 10) -> Standing:
        request = Request(f"r{self.count}", prompt_len, 100, 0.0, tenant=tenant)
        sequence = Standing(request, self.count)
        self.count += 1
        self.vtc.submitted(sequence, 0.0)
        return sequence

    def decode(self, *sequences: Standing) -> None:
        """Their prompts are done and the first token is out."""
        for sequence in sequences:
            self.vtc.started(sequence, 0.0)
            sequence.output_len += 1
            self.vtc.decoding(sequence, 0.0)
        self.vtc.stepped(StepFacts(((1, 1),), 0, 0, 1, 0.1), 0.0)

    def steps(self, count: int, *sequences: Standing, leap: bool = False) -> None:
        for _ in range(1 if leap else count):
            for sequence in sequences:
                sequence.output_len += count if leap else 1
            self.vtc.stepped(StepFacts((), len(sequences), 0, count if leap else 1, 0.1), 0.0)

    def end(self, sequence: Standing) -> None:
        self.vtc.left(sequence, 0.0)
        self.vtc.finished(sequence, FinishReason.LENGTH, 0.0)

    def order(self, *sequences: Standing) -> list[str]:
        self.vtc.version(0.0)
        return [s.request.id for s in sorted(sequences, key=lambda each: self.vtc.key(each, 0.0))]


def test_prompts_count_when_they_start_and_output_as_it_comes() -> None:
    scene = Scene()
    first = scene.submit("a", 30)
    assert scene.vtc.counter("a") == 0.0
    scene.decode(first)
    assert scene.vtc.counter("a") == 30 + 2
    scene.steps(5, first)
    assert scene.vtc.counter("a") == 30 + 2 * 6
    scene.end(first)
    assert scene.vtc.counter("a") == 30 + 2 * 6


def test_leaps_and_single_steps_come_to_the_same() -> None:
    counters = []
    for leap in (False, True):
        scene = Scene()
        one, two = scene.submit("a"), scene.submit("a")
        scene.decode(one, two)
        scene.steps(7, one, two, leap=leap)
        scene.end(one)
        scene.steps(4, two, leap=leap)
        counters.append(scene.vtc.counter("a"))
    assert counters[0] == counters[1] == 20 + 2 * (8 + 12)


def test_what_is_computed_again_is_not_charged_again() -> None:
    scene = Scene()
    victim = scene.submit("a", 50)
    scene.decode(victim)
    scene.steps(3, victim)
    scene.vtc.left(victim, 0.0)
    before = scene.vtc.counter("a")
    scene.decode(victim)
    assert scene.vtc.counter("a") == before + 2, "only the token that is new"


def test_counters_are_divided_by_weights() -> None:
    scene = Scene(a=4.0)
    scene.decode(scene.submit("a", 38))
    assert scene.vtc.counter("a") == 10.0


def test_the_least_served_tenant_goes_first_and_arrivals_within_it() -> None:
    scene = Scene()
    running = [scene.submit("a", 40), scene.submit("b", 30)]
    waiting = [scene.submit("a"), scene.submit("b"), scene.submit("b"), scene.submit("a")]
    scene.decode(*running)
    assert scene.order(*waiting) == ["r3", "r4", "r2", "r5"]


def test_a_tenant_that_comes_back_is_lifted_to_those_that_wait() -> None:
    scene = Scene()
    scene.decode(scene.submit("a", 500), scene.submit("b", 300))
    scene.submit("b")
    scene.submit("a")
    scene.submit("new")
    assert scene.vtc.counter("new") == scene.vtc.counter("b") == 302


def test_where_nobody_waits_it_is_lifted_to_whoever_left_last() -> None:
    scene = Scene()
    scene.decode(scene.submit("a", 500))
    scene.submit("new")
    assert scene.vtc.counter("new") == scene.vtc.counter("a") == 502


def test_a_tenant_with_work_waiting_is_not_lifted() -> None:
    scene = Scene()
    scene.submit("late")
    scene.decode(scene.submit("a", 500))
    scene.submit("a")
    scene.submit("late")
    assert scene.vtc.counter("late") == 0.0


def test_the_version_moves_with_the_order_only() -> None:
    scene = Scene()
    running = [scene.submit("a", 10), scene.submit("a", 10), scene.submit("b", 40)]
    scene.decode(*running)
    version = scene.vtc.version(0.0)
    scene.steps(5, *running)
    assert scene.vtc.version(0.0) == version
    scene.steps(20, *running)
    assert scene.vtc.version(0.0) == version + 1


class Window:
    """As much of a view as `steps_valid` reads."""

    def __init__(self, *waiting: Standing) -> None:
        self.waiting: Any = waiting
        self.waiting_count = len(waiting)


@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 10.0, 1e6]),
)
@settings(max_examples=200, deadline=None)
def test_answers_stand_for_as_long_as_it_says(
    a: int, b: int, a_runs: int, b_runs: int, margin: float
) -> None:
    scene = Scene(VtcOptions(swap_margin_tokens=margin))
    running = {"a": [scene.submit("a", 1 + a) for _ in range(a_runs)], "b": [scene.submit("b", 1 + b)] * 0}
    running["b"] = [scene.submit("b", 1 + b) for _ in range(b_runs)]
    scene.decode(*running["a"], *running["b"])
    waiting = [scene.submit("a"), scene.submit("b")]
    everybody = [*running["a"], *running["b"]]

    def answers() -> tuple[list[str], list[bool]]:
        order = scene.order(*waiting)
        head = next(each for each in waiting if each.request.id == order[0])
        return order, [scene.vtc.outranks(head, each, 0.0) for each in everybody]

    now = answers()
    head = next(each for each in waiting if each.request.id == now[0][0])
    valid = scene.vtc.steps_valid(Window(head, *waiting), 0.0)
    assert valid >= 1
    for _ in range(min(valid, 100) - 1):
        scene.steps(1, *everybody)
        order, displaced = answers()
        assert order == now[0]
        assert not any(later and not before for later, before in zip(displaced, now[1], strict=True))


def test_only_far_behind_somebody_is_displaced() -> None:
    scene = Scene(VtcOptions(swap_margin_tokens=100.0))
    running = scene.submit("a", 50)
    waiting = scene.submit("b")
    scene.decode(running)
    scene.order(running, waiting)
    assert not scene.vtc.outranks(waiting, running, 0.0)
    scene.steps(30, running)
    scene.order(running, waiting)
    assert scene.vtc.outranks(waiting, running, 0.0) and not scene.vtc.outranks(running, waiting, 0.0)


def test_counters_of_strangers_are_bounded() -> None:
    scene = Scene()
    for index in range(IDLE_TENANTS_MAX + 100):
        sequence = scene.submit(f"t{index}")
        scene.decode(sequence)
        scene.end(sequence)
    vtc = scene.vtc
    assert len(vtc._idle) == IDLE_TENANTS_MAX and not vtc._tenants and not vtc._charged and not vtc._decodes


# ---- in a replica ---------------------------------------------------------------------------------------

PROMPT_MAX, OUTPUT_MAX, SLOTS, KV_BLOCKS = 12, 12, 3, 30


@pytest.mark.parametrize("seed", range(12))
def test_backlogged_tenants_differ_by_no_more_than_the_papers_bound(seed: int) -> None:
    """Theorem 4.4: 2·max(wp·Linput, wq·M), in any interval in which both have work waiting; with cancels."""
    draw = random.Random(seed)
    limits = ReplicaLimits(KV_BLOCKS, 4, SLOTS, 16, 64, False, True)
    replica = Replica(limits, make_stack(PolicySettings(rank="vtc")))
    executor = FakeExecutor(4)
    asked = {"a": 40, "b": 90}
    requests: dict[str, Request] = {}
    for tenant, count in asked.items():
        for index in range(count):
            prompt = [draw.randrange(1000) for _ in range(draw.randint(1, PROMPT_MAX))]
            name = f"{tenant}{index}"
            output = draw.randint(1, OUTPUT_MAX)
            requests[name] = Request(name, len(prompt), output, 0.0, prompt_tokens=prompt, tenant=tenant)
    for name in draw.sample(sorted(requests), len(requests)):
        replica.submit(requests[name], 0.0)
    service, gaps, step = dict.fromkeys(asked, 0), [], 0.0
    seen: dict[str, int] = {}
    while (plan := replica.plan(step)) is not None:
        for start in plan.starts:
            if start.request_id not in seen:
                seen[start.request_id] = 0
                service[requests[start.request_id].tenant] += requests[start.request_id].prompt_len
        events = replica.complete(plan, executor.execute(plan), step)
        for sequence in replica.running:
            service[sequence.request.tenant] += 2 * (sequence.output_len - seen[sequence.request.id])
            seen[sequence.request.id] = sequence.output_len
        for event in events:
            if isinstance(event, Finished):
                request = requests[event.request_id]
                service[request.tenant] += 2 * (event.output_tokens - seen[event.request_id])
        if {sequence.request.tenant for sequence in replica.waiting} == set(asked):
            gaps.append(service["a"] - service["b"])
            if draw.random() < 0.02:
                victim = draw.choice([sequence.request.id for sequence in replica.waiting])
                replica.cancel(victim, CancelReason.ADMIN, step)
        step += 1.0
    bound = 2 * max(PROMPT_MAX, 2 * SLOTS * (PROMPT_MAX + OUTPUT_MAX))
    assert len(gaps) > 50 and max(gaps) - min(gaps) <= bound
