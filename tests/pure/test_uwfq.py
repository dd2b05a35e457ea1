"""User weighted fair queuing: the card's own checks on one server, lies, programs, single decisions."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from one_server import Standing, serve_in_quanta

from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.policies.base import NoOptions
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.rank import Rank, RankKey
from penstock.policies.rank.fcfs import Fcfs
from penstock.policies.rank.uwfq import UserWeightedFair, UwfqOptions
from penstock.policies.rank.vtc import VirtualTokenCounters, VtcOptions
from penstock.policies.view import SequenceView, StepFacts

QUANTUM = 20


class Told(UserWeightedFair):
    """Knows every length, times `error` where a request has one."""

    def __init__(self, errors: dict[str, float] | None = None, **weights: float) -> None:
        super().__init__(Context(ServiceTerms(tenant_weights=weights)), UwfqOptions(0.0, 1.0))
        self.errors = errors or {}

    def expected_work(self, sequence: SequenceView) -> float:
        request = sequence.request
        return request.max_output_tokens * self.errors.get(request.id, 1.0)


def counters() -> Rank:
    return VirtualTokenCounters(Context(), VtcOptions(0.0, 1.0))


def latencies(rank: Rank, requests: Sequence[Request]) -> dict[str, float]:
    ends = serve_in_quanta(rank, requests, QUANTUM)
    return {request.id: ends[request.id] - request.arrival_s for request in requests}


def job(name: str, size: int, arrival_s: float, **hints: str) -> Request:
    return Request(name, 1, size, arrival_s, tenant=name.split("-")[0], **hints)  # type: ignore[arg-type]


# ---- the card's tests -----------------------------------------------------------------------------------


def burst() -> list[Request]:
    big = [job(f"{tenant}-{index}", 100, 0.0) for index in range(20) for tenant in ("a", "b")]
    return [*big, job("c-0", 100, 300.0), job("d-0", 100, 300.0)]


def test_a_burst_of_others_does_not_touch_small_tenants() -> None:
    before, after = (latencies(rank, burst()) for rank in (Fcfs(Context(), NoOptions()), Told()))
    small = [np.mean([found["c-0"], found["d-0"]]) for found in (before, after)]
    assert small[1] <= 0.15 * small[0]
    assert np.mean(list(after.values())) == pytest.approx(np.mean(list(before.values())), rel=0.05)


def overload(seed: int, count: int = 500) -> list[Request]:
    draw, now_s, requests = random.Random(seed), 0.0, []
    sizes = [max(5, min(8000, int(20 * draw.paretovariate(1.1)))) for _ in range(count)]
    for index, size in enumerate(sizes):
        tenant = "heavy" if draw.random() < 0.6 else f"light{draw.randrange(4)}"
        requests.append(job(f"{tenant}-{index}", size, now_s))
        now_s += draw.expovariate(1.4 / float(np.mean(sizes)))
    return requests


def test_in_overload_small_work_does_not_wait_for_big_work_of_its_tenant() -> None:
    """Card test 2: mean ≤ 0.5×, small requests ≤ 0.1× of counters; light tenants at most a tenth worse."""
    ratios = []
    for seed in range(3):
        requests = overload(seed)
        before, after = latencies(counters(), requests), latencies(Told(), requests)
        half = np.median([request.max_output_tokens for request in requests])
        groups = [
            [r.id for r in requests],
            [r.id for r in requests if r.max_output_tokens <= half],
            [r.id for r in requests if r.tenant != "heavy"],
        ]
        ratios.append(
            [np.mean([after[n] for n in ids]) / np.mean([before[n] for n in ids]) for ids in groups]
        )
        assert max(after.values()) < 4 * max(before.values()), "the price is bounded"
    overall, small, light = np.mean(ratios, axis=0)
    assert overall <= 0.5 and small <= 0.1 and light <= 1.1, ratios


def test_wrong_estimates_keep_half_of_the_gain() -> None:
    """Card test 3: lognormal errors with σ = 1."""
    requests = overload(7)
    draw = random.Random("errors")
    errors = {request.id: draw.lognormvariate(0.0, 1.0) for request in requests}
    means = [
        float(np.mean(list(latencies(rank, requests).values())))
        for rank in (counters(), Told(), Told(errors))
    ]
    assert means[0] - means[2] >= 0.5 * (means[0] - means[1])


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one after another"])
def test_whoever_declares_nothing_gains_nothing_after_three_completions(at_once: bool) -> None:
    """Card test 3. The liar against itself being honest, beside an honest tenant that always has work."""
    requests = []
    for index in range(30):
        requests.append(job(f"liar-{index}", 100, 0.0 if at_once else 210.0 * index))
        requests.append(job(f"honest-{index}", 100, 0.0 if at_once else 210.0 * index))
    lies = {request.id: 0.0 for request in requests if request.tenant == "liar"}
    honest, lying = (serve_in_quanta(Told(errors), requests, QUANTUM) for errors in ({}, lies))
    gains = [honest[f"liar-{index}"] - lying[f"liar-{index}"] for index in range(3, 30)]
    assert max(gains) <= 2 * QUANTUM, "no job after the third ends earlier for the lie, but for a turn"
    harm = [lying[f"honest-{index}"] - honest[f"honest-{index}"] for index in range(3, 30)]
    assert max(harm) <= 100 + 2 * QUANTUM, "others are behind by what the first lie gained, for once"


def test_a_tenant_that_slept_does_not_monopolise() -> None:
    requests = [job("sleeper-0", 10, 0.0)]
    requests += [job(f"busy-{index}", 100, 10.0) for index in range(40)]
    requests += [job(f"sleeper-{index}", 100, 2000.0) for index in range(1, 11)]
    ends = serve_in_quanta(Told(), requests, QUANTUM)
    begun = sorted(end for name, end in ends.items() if name.startswith("sleeper") and end > 2000.0)
    busy_meanwhile = sum(2000.0 < end <= begun[-1] for name, end in ends.items() if name.startswith("busy"))
    assert busy_meanwhile >= 8, "the other tenant got as much in the same time"


def test_weights_are_shares() -> None:
    requests = [job(f"{tenant}-{index}", 100, 0.0) for index in range(30) for tenant in ("a", "b")]
    ends = serve_in_quanta(Told(a=3.0), requests, QUANTUM)
    done = {tenant: sum(end <= 2000.0 for name, end in ends.items() if name[0] == tenant) for tenant in "ab"}
    assert done["a"] in (14, 15, 16) and done["b"] in (4, 5, 6)


def test_backlogged_tenants_get_their_share_less_a_job() -> None:
    """Service of each at any time is at least a half, less the largest job and a quantum."""
    draw = random.Random("share")
    requests = [
        job(f"{tenant}-{index}", draw.randint(5, 150), 0.0) for index in range(60) for tenant in ("a", "b")
    ]
    sizes = {request.id: request.max_output_tokens for request in requests}
    ends = sorted((end, name) for name, end in serve_in_quanta(Told(), requests, QUANTUM).items())
    served, last = {"a": 0, "b": 0}, {"a": 0.0, "b": 0.0}
    for end, name in ends:
        served[name[0]] += sizes[name]
        last[name[0]] = end
        if end < 0.8 * ends[-1][0]:
            assert abs(served["a"] - served["b"]) <= 2 * (150 + QUANTUM)


# ---- in pieces ------------------------------------------------------------------------------------------


def keys(rank: Rank, *sequences: Standing) -> list[RankKey]:
    return [rank.key(sequence, 0.0) for sequence in sequences]


def submit(rank: Rank, name: str, size: int, index: int, now_s: float = 0.0, **hints: str) -> Standing:
    sequence = Standing(job(name, size, now_s, **hints), index, now_s)
    rank.submitted(sequence, now_s)
    return sequence


def test_a_small_job_passes_the_big_ones_of_its_tenant_only() -> None:
    rank = Told()
    big, other = submit(rank, "a-0", 500, 0), submit(rank, "b-0", 300, 1)
    small = submit(rank, "a-1", 50, 2)
    assert keys(rank, small, other, big) == [(50.0,), (300.0,), (550.0,)]


def test_calls_of_a_program_in_flight_are_one_job() -> None:
    rank = Told()
    first = submit(rank, "a-0", 100, 0, program_id="p")
    second = submit(rank, "a-1", 100, 1, program_id="p")
    third = submit(rank, "a-2", 150, 2, program_id="q")
    assert keys(rank, first, second, third) == [(350.0,), (350.0,), (150.0,)]


def test_splitting_a_job_gains_nothing() -> None:
    def last_of(pieces: int) -> float:
        requests = [job(f"b-{index}", 100, 0.0) for index in range(10)]
        requests += [job(f"a-{index}", 600 // pieces, 0.0) for index in range(pieces)]
        ends = serve_in_quanta(Told(), requests, QUANTUM)
        return max(end for name, end in ends.items() if name.startswith("a"))

    assert last_of(12) >= last_of(1) - 100 - QUANTUM


def test_a_request_that_is_cancelled_costs_what_it_took() -> None:
    rank = Told()
    first, second = submit(rank, "a-0", 100, 0), submit(rank, "a-1", 200, 1)
    rank.finished(first, FinishReason.CANCELLED, 0.0)
    rank.version(0.0)
    assert keys(rank, second) == [(200.0,)]


def test_tokens_from_the_cache_are_free() -> None:
    rank = UserWeightedFair(Context(), UwfqOptions(1.0, 1.0))
    first = Standing(Request("a-0", 100, 10, 0.0, tenant="a"), 0)
    second = Standing(Request("a-1", 100, 10, 0.0, tenant="a"), 1)
    for sequence in (first, second):
        rank.submitted(sequence, 0.0)
    assert keys(rank, second) == [(220.0,)]
    first.computed_len = 90
    rank.started(first, 0.0)
    first.output_len = 10
    rank.finished(first, FinishReason.LENGTH, 1.0)
    rank.stepped(StepFacts(((10, 100),), 0, 0, 1, 1.0), 1.0)
    assert keys(rank, second) == [(130.0,)]


def test_grace_is_half_of_what_is_done_in_its_time() -> None:
    """As the paper's code has it: 10 tokens a second so far, and 3 s of grace."""
    rank = Told()
    assert rank._grace(5.0) == 0.0
    submit(rank, "a-0", 500, 0)
    rank.stepped(StepFacts((), 1, 10, 100, 10.0), 10.0)
    submit(rank, "b-0", 500, 1, 10.0)
    assert rank._grace(10.0) == pytest.approx(3.0 * 10.0 / 2)


def test_only_by_a_margin_somebody_who_runs_is_displaced() -> None:
    rank = UserWeightedFair(Context(), UwfqOptions(0.0, 1.0, swap_margin_tokens=100.0))
    running, near = submit(rank, "a-0", 500, 0), submit(rank, "b-0", 450, 1)
    far = submit(rank, "c-0", 300, 2)
    assert not rank.outranks(near, running, 0.0) and rank.outranks(far, running, 0.0)
    assert not rank.outranks(running, far, 0.0)


def test_it_forgets_what_has_ended() -> None:
    rank = Told()
    for index in range(50):
        sequence = submit(rank, f"t{index}-0", 10, index, float(index), program_id="p")
        rank.finished(sequence, FinishReason.CANCELLED, float(index))
        rank.version(float(index))
    assert not rank._calls and not rank._open and len(rank.fluid.active) <= 1
