"""The online model of step times, and the budget in milliseconds that stands on it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_executor import FakeExecutor, make_replica
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.metrics import Slo
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import StepPlan
from penstock.policies.compose.ms_budget import MsBudget
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.estimate.step_time import (
    BUCKET_SAMPLES,
    StepTimes,
    chunk_pairs,
    nonnegative_solution,
)
from penstock.policies.stack import make_stack
from penstock.policies.view import StepFacts
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica
from penstock.replica.sequence import Sequence


def true_s(rows: int, samples: int, context: float, pairs: float) -> float:
    bend = max(0, rows - 256) * 20e-6
    return 0.004 + 2e-6 * rows + bend + 3e-6 * samples + 4e-8 * context + 5e-9 * pairs


class Machine:
    """Tells a `StepTimes` of steps that take `true_s`, with hiccups where asked."""

    def __init__(self, hiccups: float = 0.0) -> None:
        self.times = StepTimes(Context())
        self.now_s = 0.0
        self._hiccups = hiccups
        self._draw = random.Random(1)
        self._sequence = Sequence(0, Request("r", 1, 1, 0.0), 0.0)
        self.times.submitted(self._sequence, 0.0)

    def step(self, prefills: tuple[tuple[int, int], ...], decodes: int, context: int, steps: int = 1) -> None:
        rows = decodes + sum(new for new, _ in prefills)
        pairs = sum(chunk_pairs(new, after) for new, after in prefills)
        began_s = self.now_s
        for index in range(steps):
            slow = 3.0 if self._draw.random() < self._hiccups else 1.0
            self.now_s += slow * true_s(rows, decodes, context + index * decodes, pairs)
        facts = StepFacts(prefills, decodes, context, steps, self.now_s - began_s)
        self.times.stepped(facts, self.now_s)

    def work(self, count: int = 300) -> None:
        draw = self._draw
        for _ in range(count):
            decodes = draw.randint(1, 64)
            context = decodes * draw.randint(50, 3000)
            if draw.random() < 0.7:
                new = draw.choice((16, 64, 200, 400, 700))
                self.step(((new, new + draw.randint(0, 2000)),), decodes, context)
            else:
                self.step((), decodes, context, draw.randint(1, 30))


PROBES = (
    (40, 40, 40_000, 0.0),
    (300, 44, 20_000, chunk_pairs(260, 1000)),
    (600, 100, 150_000, chunk_pairs(500, 500)),
)


def test_it_learns_what_a_step_takes() -> None:
    machine = Machine()
    assert not machine.times.is_ready
    machine.work()
    for probe in PROBES:
        assert machine.times.seconds(*probe) == pytest.approx(true_s(*probe), rel=0.03)


def test_hiccups_count_little() -> None:
    machine = Machine(hiccups=0.15)
    machine.work(600)
    for probe in PROBES:
        assert machine.times.seconds(*probe) == pytest.approx(true_s(*probe), rel=0.15)


def test_it_follows_a_machine_that_has_become_slower() -> None:
    machine = Machine()
    machine.work()
    before = machine.times.seconds(*PROBES[1])
    machine._hiccups = 1.0
    machine.work(600)
    assert machine.times.seconds(*PROBES[1]) == pytest.approx(3 * before, rel=0.1)


def test_no_coefficient_is_negative_so_more_work_never_costs_less() -> None:
    machine = Machine(hiccups=0.3)
    machine.work()
    assert machine.times._coefficients is not None and min(machine.times._coefficients) >= 0.0


def test_memory_is_bounded() -> None:
    machine = Machine()
    machine.work(3000)
    assert all(len(bucket) <= BUCKET_SAMPLES for bucket in machine.times._buckets.values())
    assert len(machine.times._buckets) <= 2 * 21  # by the bits of a step's rows, which has a bound


@given(splits=st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_a_leap_teaches_exactly_what_its_steps_would(splits: list[int]) -> None:
    """The same instants, told in different portions, give the same coefficients bit for bit."""
    told: list[StepTimes] = []
    for as_leaps in (True, False):
        times, now_s, context = StepTimes(Context()), 0.0, 1000
        times.submitted(Sequence(0, Request("r", 1, 1, 0.0), 0.0), 0.0)
        for steps in splits * 4:
            began_s = now_s
            now_s += true_s(90, 8, context, 4000.0)
            times.stepped(StepFacts(((80, 90),), 8, context, 1, now_s - began_s), now_s)
            ends = []
            for index in range(steps):
                began_s = ends[-1] if ends else now_s
                ends.append(began_s + true_s(8, 8, context + 8 * index, 0.0))
            portions = [(0, steps)] if as_leaps else [(index, index + 1) for index in range(steps)]
            for first, stop in portions:
                began_s = ends[first - 1] if first else now_s
                facts = StepFacts((), 8, context + 8 * first, stop - first, ends[stop - 1] - began_s)
                times.stepped(facts, ends[stop - 1])
            now_s, context = ends[-1], context + 8 * steps
        told.append(times)
    assert told[0]._coefficients == told[1]._coefficients


def test_idle_time_is_no_part_of_a_step() -> None:
    times = StepTimes(Context())
    sequence = Sequence(0, Request("r", 1, 1, 0.0), 0.0)
    for turn in range(40):
        at_s = 100.0 * turn
        times.submitted(sequence, at_s)
        times.stepped(StepFacts(((64, 64),), 0, 0, 1, 0.01), at_s + 0.01)
        times.finished(sequence, FinishReason.LENGTH, at_s + 0.01)
    assert times.seconds(64, 1, 0, chunk_pairs(64, 64)) == pytest.approx(0.01, rel=0.01)


def test_the_solver_finds_the_best_nonnegative_point() -> None:
    draw = np.random.default_rng(4)
    for _ in range(30):
        matrix = draw.normal(size=(20, 5))
        wanted = draw.normal(size=20)
        found = nonnegative_solution(matrix.T @ matrix, matrix.T @ wanted)
        gradient = matrix.T @ (matrix @ found - wanted)
        assert (found >= 0).all()
        assert (gradient[found > 1e-9] == pytest.approx(0.0, abs=1e-5)) and (gradient >= -1e-5).all()


# ---- the budget -------------------------------------------------------------------------------------------


def served_gaps(
    target_ms: float, terms: ServiceTerms | None = None, compose: str = "ms-budget"
) -> tuple[list[float], list[StepPlan]]:
    """Streams that decode while prompts keep coming: seconds of the steps with decodes, and all plans."""
    options: dict[str, dict[str, object]] = {"ms-budget": {"target_ms": target_ms}}
    limits = ReplicaLimits(4000, 4, 64, 4096, 8000, prefix_cache=False)
    replica = Replica(limits, make_stack(PolicySettings(compose=compose, options=options), terms))
    executor, now_s, gaps, number = FakeExecutor(4), 0.0, [], 0
    for index in range(8):
        replica.submit(Request(f"s{index}", 8, 400, 0.0, prompt_tokens=[index] * 8, slo_class="chat"), 0.0)
    for step in range(260):
        if step % 20 == 5:
            replica.submit(Request(f"p{number}", 700, 3, now_s, prompt_tokens=[number] * 700), now_s)
            number += 1
        plan = replica.plan(now_s)
        assert plan is not None
        result = executor.execute(plan)
        pairs = sum(chunk_pairs(chunk.count, chunk.start + chunk.count) for chunk in plan.chunks)
        context = replica.decode_context + plan.decode_count
        result.duration_s = true_s(plan.token_count, plan.decode_count, context, pairs)
        now_s += result.duration_s
        replica.complete(plan, result, now_s)
        if plan.decode_count:
            gaps.append(result.duration_s)
    return gaps, executor.plans


def test_gaps_stay_at_the_target_once_it_has_learned() -> None:
    gaps, _ = served_gaps(8.0)
    late = sorted(gaps[100:])
    assert late[-3] <= 0.0081 and late[-1] <= 0.0095
    assert max(gaps[100:]) >= 0.0065  # and it uses what the target leaves


def test_the_tightest_class_that_decodes_sets_the_target() -> None:
    terms = ServiceTerms({"chat": Slo(tpot_ms=7.0), "batch": Slo(tpot_ms=500.0)})
    gaps, _ = served_gaps(0.0, terms)
    assert sorted(gaps[100:])[-3] <= 0.0071


def test_prompts_never_starve_below_what_decodes_take() -> None:
    """No step can hold the target: prompts, which come faster than that, get 32 tokens in each, together."""
    gaps, plans = served_gaps(0.5)
    assert min(gaps) > 0.004
    assert {sum(chunk.count for chunk in plan.chunks) for plan in plans[100:]} == {32}
    assert any(len(plan.chunks) > 1 for plan in plans[100:])
    assert MsBudget(Context(), MsBudget.Options(target_ms=0.5)).target_s() < 0.0005, "less a margin"


def test_before_it_knows_it_is_cautious() -> None:
    replica = make_replica(kv_blocks=2000, step_tokens_max=4096, context_len_max=4000, compose="ms-budget")
    executor = FakeExecutor(4)
    replica.submit(Request("s", 8, 50, 0.0, prompt_tokens=[1] * 8), 0.0)
    first = replica.plan(0.0)
    assert first is not None
    replica.complete(first, executor.execute(first), 0.01)
    replica.submit(Request("long", 3000, 2, 0.0, prompt_tokens=[2] * 3000), 0.01)
    second = replica.plan(0.01)
    assert second is not None and second.token_count == 256


def test_without_decodes_the_step_is_as_large_as_it_may_be() -> None:
    replica = make_replica(kv_blocks=2000, step_tokens_max=2048, context_len_max=4000, compose="ms-budget")
    replica.submit(Request("long", 3000, 2, 0.0, prompt_tokens=[2] * 3000), 0.0)
    plan = replica.plan(0.0)
    assert plan is not None and plan.token_count == 2048
