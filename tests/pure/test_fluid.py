"""The fluid system against a simulator that serves everybody a little at a time, and its invariants."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from penstock.policies.rank.fluid import Fluid, Job

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0}
RATE = 1000.0  # work units a second
STEP_S = 1e-4  # a tenth of the card's millisecond: 0.1 units


def weight_of(tenant: str) -> float:
    return WEIGHTS[tenant]


@dataclass
class BruteTenant:
    weight: float
    left: list[tuple[int, float]] = field(default_factory=list)  # (job number, work left)


class BruteFluid:
    """No formula: each step shares its work by weight, and a tenant's part by its jobs."""

    def __init__(self) -> None:
        self.tenants = {name: BruteTenant(weight) for name, weight in WEIGHTS.items()}
        self.virtual = 0.0

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            active = [tenant for tenant in self.tenants.values() if tenant.left]
            if not active:
                return
            advance = RATE * STEP_S / sum(tenant.weight for tenant in active)
            self.virtual += advance
            for tenant in active:
                share = advance * tenant.weight / len(tenant.left)
                tenant.left = [(number, work - share) for number, work in tenant.left if work > share]

    def finishes(self, sizes: dict[int, float]) -> dict[int, float]:
        """V at which each unfinished job ends when its tenant's jobs run one after another, by work left."""
        found = {}
        for tenant in self.tenants.values():
            order = sorted(tenant.left, key=lambda job: (job[1], job[0]))
            finish = self.virtual + sum(work for _, work in order) / tenant.weight
            for number, _ in reversed(order):
                found[number] = finish
                finish -= sizes[number] / tenant.weight
        return found


arrivals = st.lists(
    st.tuples(st.integers(0, 120), st.sampled_from("abc"), st.integers(4, 90)), min_size=1, max_size=9
).map(lambda rows: sorted(rows, key=lambda row: row[0]))


@given(arrivals, st.integers(0, 150))
@settings(max_examples=60, deadline=None)
def test_deadlines_and_ends_are_those_of_brute_force(rows: list[tuple[int, str, int]], rest_ms: int) -> None:
    """As of the last arrival; and the work that is left of every job some time later."""
    fluid, brute, jobs, now_ms = Fluid(weight_of), BruteFluid(), [], 0
    for at_ms, tenant, size in rows:
        fluid.advance(RATE * (at_ms - now_ms) / 1e3)
        brute.run((at_ms - now_ms) / 1e3)
        if not fluid.active or not any(each.left for each in brute.tenants.values()):
            fluid.drain()  # a step's rounding must not decide whether somebody is idle
            for each in brute.tenants.values():
                each.left = []
            brute.virtual = fluid.virtual
        now_ms = at_ms
        job = fluid.arrive(tenant, float(size))
        jobs.append(job)
        brute.tenants[tenant].left.append((job.number, float(size)))
    tolerance = 1.0 * len(rows)  # a step's work is lost with each end
    expected = brute.finishes({job.number: job.size for job in jobs})
    for each in brute.tenants.values():  # which of two that end together comes first is rounding
        left = sorted(work for _, work in each.left)
        assume(all(later - earlier > tolerance / 2 for earlier, later in zip(left, left[1:], strict=False)))
    flowing = [job for job in jobs if job.number in expected and fluid.flows(job)]
    for job in flowing:
        assert job.finish == pytest.approx(expected[job.number], abs=tolerance)
    for one in flowing:
        for other in flowing:
            if expected[one.number] + 2 * tolerance < expected[other.number]:
                assert one.finish < other.finish, "the order is the same"
    for tenant in {job.tenant for job in flowing}:
        last = max(expected[job.number] for job in flowing if job.tenant == tenant)
        assert fluid.end_of(tenant) == pytest.approx(last, abs=tolerance)
    fluid.advance(RATE * rest_ms / 1e3)
    brute.run(rest_ms / 1e3)
    left = {number: work for each in brute.tenants.values() for number, work in each.left}
    for job in jobs:
        assert left_of(fluid, job) == pytest.approx(left.get(job.number, 0.0), abs=2 * tolerance)


def left_of(fluid: Fluid, job: Job) -> float:
    """Work that the fluid has still to serve of the job."""
    return job.own_finish - fluid._tenants[job.tenant].clock if fluid.flows(job) else 0.0


@given(arrivals, st.lists(st.floats(0.0, 60.0), min_size=9, max_size=9))
@settings(max_examples=200, deadline=None)
def test_time_runs_forward_and_chains_are_strict(
    rows: list[tuple[int, str, int]], pauses: list[float]
) -> None:
    fluid, jobs = Fluid(weight_of), []
    for (_, tenant, size), work in zip(rows, pauses, strict=False):
        before = fluid.virtual
        jobs.append(fluid.arrive(tenant, float(size)))
        fluid.advance(work)
        assert fluid.virtual >= before
        for name in "abc":
            own = sorted(job.finish for job in jobs if job.tenant == name and fluid.flows(job))
            assert all(earlier < later for earlier, later in zip(own, own[1:], strict=False))


@given(arrivals)
@settings(max_examples=100, deadline=None)
def test_the_fluid_serves_all_that_is_there(rows: list[tuple[int, str, int]]) -> None:
    """Work-conserving: it is empty exactly when it was served the sum of all sizes."""
    fluid = Fluid(weight_of)
    for _, tenant, size in rows:
        fluid.arrive(tenant, float(size))
    total = sum(size for *_, size in rows)
    fluid.advance(total - 0.01)
    assert fluid.active
    fluid.advance(0.02)
    assert not fluid.active


def test_several_jobs_end_within_one_look() -> None:
    """30 of work ends the first of three, 20 more the second; the other 50 are the last one's alone."""
    fluid = Fluid(weight_of)
    jobs = [fluid.arrive("a", size) for size in (10.0, 20.0, 90.0)]
    fluid.advance(100.0)
    assert [left_of(fluid, job) for job in jobs] == [0.0, 0.0, pytest.approx(20.0)]


def test_pieces_get_no_more_service_than_the_whole() -> None:
    def end_after(pieces: int) -> float:
        fluid = Fluid(weight_of)
        fluid.arrive("b", 500.0)
        for _ in range(pieces):
            fluid.arrive("a", 400.0 / pieces)
        fluid.advance(300.0)
        fluid.arrive("b", 100.0)
        return fluid.end_of("a")

    assert end_after(1) == pytest.approx(end_after(8)) == pytest.approx(400.0)


def test_sleeping_saves_up_nothing() -> None:
    fluid = Fluid(weight_of)
    fluid.arrive("a", 10.0)
    fluid.advance(10.0)
    for _ in range(100):
        fluid.arrive("b", 100.0)
        fluid.advance(100.0)
    fluid.arrive("b", 100.0)
    late = fluid.arrive("a", 100.0)
    assert late.finish == pytest.approx(fluid.virtual + 100.0)


def test_a_program_that_goes_on_at_once_keeps_its_place() -> None:
    def continued(idle_work: float, grace: float | None) -> Job:
        fluid = Fluid(weight_of)
        fluid.arrive("b", 10_000.0)
        fluid.arrive("a", 100.0)
        fluid.advance(200.0 + idle_work)
        return fluid.arrive("a", 50.0, grace)

    assert continued(20.0, 30.0).finish == pytest.approx(150.0)
    assert continued(20.0, 10.0).finish == pytest.approx(170.0)
    assert continued(20.0, None).finish == pytest.approx(170.0)


def test_a_weight_is_a_share() -> None:
    fluid = Fluid(weight_of)
    light, heavy = fluid.arrive("a", 100.0), fluid.arrive("c", 200.0)
    assert light.finish == heavy.finish == 100.0
    fluid.advance(299.0)
    assert fluid.active == ["a", "c"]
    fluid.advance(1.0)
    assert fluid.virtual == pytest.approx(100.0) and not fluid.active


def test_a_debt_is_repaid_before_anything_new() -> None:
    fluid = Fluid(weight_of)
    fluid.arrive("b", 10_000.0)
    lie = fluid.arrive("a", 0.0)
    fluid.advance(10.0)
    assert not fluid.flows(lie)
    fluid.resize(lie, 300.0)
    fluid.close(lie)
    next_one = fluid.arrive("a", 100.0)
    assert next_one.finish == pytest.approx(400.0)
    fluid.advance(2 * (350.0 - fluid.virtual))  # half of it is for the other tenant
    assert left_of(fluid, next_one) == pytest.approx(50.0)


def test_late_jobs_of_a_liar_move_back_with_each_debt() -> None:
    fluid = Fluid(weight_of)
    lies = [fluid.arrive("a", 0.0) for _ in range(3)]
    fluid.arrive("b", 100.0)
    fluid.advance(10.0)
    version = fluid.version
    fluid.resize(lies[0], 50.0)
    fluid.close(lies[0])
    assert [each.finish for each in lies] == [0.0, 50.0, 50.0] and fluid.version > version
    fluid.resize(lies[1], 50.0)
    fluid.close(lies[1])
    assert lies[2].finish == 100.0


def test_an_estimate_that_was_too_high_is_given_back() -> None:
    fluid = Fluid(weight_of)
    fluid.arrive("b", 1000.0)
    first, second = fluid.arrive("a", 100.0), fluid.arrive("a", 200.0)
    assert second.finish == pytest.approx(300.0)
    fluid.resize(first, 40.0)
    assert (first.finish, second.finish) == (pytest.approx(40.0), pytest.approx(240.0))


def test_memory_of_idle_tenants_is_bounded() -> None:
    fluid = Fluid(lambda tenant: 1.0)
    for index in range(5000):
        fluid.arrive(f"t{index}", 1.0)
        fluid.advance(1.0)
    assert len(fluid._idle) <= 4096 and not fluid._tenants and len(fluid._ends) < 100
