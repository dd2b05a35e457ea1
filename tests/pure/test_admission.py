"""Admission by what memory will hold: the formula against brute force, and the policies on whole replicas."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, make_replica
from hypothesis import given, settings
from hypothesis import strategies as st
from one_server import Standing

from penstock.core.events import Finished
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import StepPlan
from penstock.policies.admit.past_future import PastFuture
from penstock.policies.context import Context
from penstock.policies.estimate.peak import future_peak, shared_future_peak
from penstock.policies.stack import REGISTRIES, make_stack
from penstock.policies.view import Candidate
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

batches = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 60)), min_size=1, max_size=12)


def simulated_peak(batch: Sequence[tuple[int, int]]) -> int:
    """Step by step: everybody grows by one, and leaves after its last token."""
    peak, alive, step = 0, list(batch), 0
    while alive:
        peak = max(peak, sum(held + step for held, _ in alive))
        alive = [(held, left) for held, left in alive if left > step]
        step += 1
    return peak


def peak_of(batch: Sequence[tuple[int, int]]) -> int:
    held, left = (np.array(column, np.int64) for column in zip(*batch, strict=True))
    return int(future_peak(held, left[None, :])[0])


@given(batches)
@settings(max_examples=200, deadline=None)
def test_the_peak_is_that_of_a_simulation(batch: list[tuple[int, int]]) -> None:
    assert peak_of(batch) == simulated_peak(batch)


@given(batches, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_sequences_does_not_matter(batch: list[tuple[int, int]], draw: random.Random) -> None:
    shuffled = list(batch)
    draw.shuffle(shuffled)
    assert peak_of(shuffled) == peak_of(batch)


@given(batches, st.tuples(st.integers(1, 400), st.integers(0, 60)))
@settings(max_examples=100, deadline=None)
def test_the_peak_is_at_least_what_is_held_and_grows_with_the_batch(
    batch: list[tuple[int, int]], more: tuple[int, int]
) -> None:
    assert sum(held for held, _ in batch) <= peak_of(batch) <= peak_of([*batch, more])


def test_it_is_neither_the_sum_of_maxima_nor_the_mean() -> None:
    """Short ones are gone when the long ones are long."""
    batch = [(100, 0), (100, 0), (100, 300)]
    assert peak_of(batch) == 400 < sum(held + left for held, left in batch)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(0, 40)), min_size=1, max_size=8),
    st.integers(1, 30),
)
@settings(max_examples=150, deadline=None)
def test_a_shared_prefix_is_charged_once(batch: list[tuple[int, int, int]], prefix: int) -> None:
    """Families of one prefix each, in order of start: the first found nothing, the others the prefix."""
    seen: set[int] = set()
    found = []
    for family, _, _ in batch:
        found.append(prefix if family in seen else 0)
        seen.add(family)
    held = np.array([prefix + own for _, own, _ in batch])
    left = np.array([[left for _, _, left in batch]])
    roots = np.array([family for family, _, _ in batch])
    peak = shared_future_peak(held, left, np.array(found), roots, sum(found))
    expected, alive, step = 0, list(batch), 0
    while alive:
        own = sum(own + step for _, own, _ in alive)
        expected = max(expected, own + prefix * len({family for family, _, _ in alive}))
        alive = [each for each in alive if each[2] > step]
        step += 1
    assert peak.tolist() == [expected]


# ---- on whole replicas --------------------------------------------------------------------------------


def run(replica: Replica, requests: Sequence[Request]) -> list[tuple[int, int]]:
    """Submit all, serve all. For each step: tokens in KV after it, and preemptions so far."""
    executor, told, now_s = FakeExecutor(replica.block_tokens), [], 0.0
    for request in requests:
        replica.submit(request, 0.0)
    while replica.has_work:
        plan = replica.plan(now_s)
        assert plan is not None
        told.append((held_after(replica, plan), replica.stats().preemptions_total))
        now_s += 1.0
        replica.complete(plan, executor.execute(plan), now_s)
        replica.check_invariants()
    return told


def held_after(replica: Replica, plan: StepPlan) -> int:
    return sum(each.computed_len for each in replica.running) + plan.token_count


def load(count: int, seed: int, prompt: tuple[int, int] = (4, 30), output: tuple[int, int] = (1, 60)) -> Any:
    draw = random.Random(seed)
    requests = []
    for index in range(count):
        length = draw.randint(*prompt)
        tokens = [draw.randrange(1000) for _ in range(length)]
        requests.append(Request(f"r{index}", length, draw.randint(*output), 0.0, prompt_tokens=tokens))
    return requests


def past_future(reserved_frac: float = 0.0, round_steps: int = 1, **limits: Any) -> Replica:
    sizes = {"kv_blocks": 64, "kv_block_tokens": 4, "running_max": 40, "step_tokens_max": 512} | limits
    options = {"past-future": {"reserved_frac": reserved_frac, "round_steps": round_steps}}
    policies = PolicySettings(admit="past-future", options=options)
    return Replica(ReplicaLimits(context_len_max=512, **sizes), make_stack(policies))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("step_tokens", [7, 48, 512])
@pytest.mark.usefixtures("known_lengths")
def test_with_exact_lengths_nobody_is_ever_evicted(seed: int, step_tokens: int) -> None:
    running_max = min(40, step_tokens - 1)  # decodes leave room for prompts
    told = run(past_future(step_tokens_max=step_tokens, running_max=running_max), load(40, seed))
    assert told[-1][1] == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("known_lengths")
def test_the_peak_is_the_most_ever_held(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one token, and prompts that fit a step: the formula has no slack left."""
    accepted: list[int] = []
    fits = PastFuture._fits

    def noting(self: PastFuture, candidate: Any, view: Any) -> bool:
        answer = fits(self, candidate, view)
        if answer:
            accepted.append(self.last_peak)
        return answer

    monkeypatch.setattr(PastFuture, "_fits", noting)
    told = run(past_future(kv_blocks=256, kv_block_tokens=1, step_tokens_max=2000), load(40, seed))
    assert max(accepted) == max(held for held, _ in told) < 256


def test_who_fits_alone_is_admitted_alone() -> None:
    replica = past_future(reserved_frac=0.9)
    told = run(replica, load(5, 1, prompt=(100, 120), output=(100, 130)))
    assert told[-1][1] == 0


def test_a_prompt_in_pieces_lives_longer() -> None:
    """Ten tokens of a step are for prompts: two steps for the first, two more for the candidate's rest."""
    policy = REGISTRIES["admit"].make("past-future", Context())
    first, candidate = (SimpleNamespace(total_len=25, computed_len=5), SimpleNamespace(total_len=31))
    view = SimpleNamespace(step_tokens_max=13, running_count=2, prefilling=[first])
    asked = Candidate(candidate, 11, 0, 0)  # type: ignore[arg-type]
    assert policy._slower(asked, view) == [1, 3], "beyond the next step"


@pytest.mark.parametrize(("running", "draws"), [(10, 5), (60, 4), (120, 2)])
def test_the_more_run_the_fewer_scenarios(running: int, draws: int) -> None:
    """min(5, 200 // running + 1) a round, as published."""
    replica = past_future(kv_blocks=4000, running_max=200, step_tokens_max=4000)
    requests = load(running + 1, 1, output=(50, 60))
    *early, late = requests
    for request in early:
        replica.submit(request, 0.0)
    executor = FakeExecutor(4)
    for step in range(2):
        plan = replica.plan(float(step))
        assert plan is not None and replica.running_count == running
        replica.complete(plan, executor.execute(plan), step + 0.5)
    replica.submit(late, 2.0)
    replica.plan(2.0)
    assert replica._stack.admit._draws == draws  # type: ignore[attr-defined]


@pytest.mark.parametrize(("pin_s", "running"), [(1000.0, 1), (0.0, 2)])
def test_what_is_pinned_cannot_be_planned_with(pin_s: float, running: int) -> None:
    """Of 80 tokens a pin holds 24; two requests that come to 28 each fit beside each other without it."""
    policies = PolicySettings(
        rank="program-fcfs",
        retain="continuum",
        admit="past-future",
        options={"past-future": {"reserved_frac": 0.0}},
    )
    replica = Replica(ReplicaLimits(20, 4, 8, 64, 512), make_stack(policies))
    first = load(1, 1, prompt=(20, 20), output=(5, 5))[0]
    run(replica, [replace(first, program_id="a", pin_s=pin_s)])
    assert replica.blocks_pinned == (6 if pin_s else 0)
    for request in load(2, 2, prompt=(8, 8), output=(20, 20)):
        replica.submit(replace(request, id=f"late-{request.id}"), 10.0)
    replica.plan(10.0)
    assert replica.running_count == running


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("round_steps", [1, 3, 10])
def test_standing_plans_change_nothing(seed: int, round_steps: int) -> None:
    """Lengths are learned, outputs end where the tokens say, and the pool is tight."""
    ends: list[list[tuple[str, float, int]]] = []
    for repeat in (True, False):
        replica, events = past_future(round_steps=round_steps, repeat=repeat, kv_blocks=48), []
        executor, waiting = FakeExecutor(4), load(60, seed, output=(20, 60))
        for step in range(3000):
            if waiting and step % 4 == 0:
                replica.submit(waiting.pop(0), float(step))
            plan = replica.plan(float(step))
            if plan is not None:
                events += replica.complete(plan, executor.execute(plan), step + 0.5)
        ends.append([(e.request_id, e.at_s, e.output_tokens) for e in events if isinstance(e, Finished)])
        assert len(ends[-1]) == 60
    assert ends[0] == ends[1]


def test_a_prefix_in_common_lets_more_run() -> None:
    stem = list(range(40))
    requests = [
        Request(f"r{i}", 44, 20, 0.0, prompt_tokens=[*stem, i, i, i, i], leader_id="r0" if i else None)
        for i in range(12)
    ]
    most = []
    for prefix_cache in (True, False):
        replica = past_future(kv_blocks=48, prefix_cache=prefix_cache)
        executor, running = FakeExecutor(4), 0
        for request in requests:
            replica.submit(request, 0.0)
        step = 0
        while replica.has_work:
            plan = replica.plan(float(step))
            assert plan is not None
            replica.complete(plan, executor.execute(plan), step + 0.5)
            running, step = max(running, replica.running_count), step + 1
        most.append(running)
        assert replica.stats().preemptions_total == 0
    assert most[0] >= 2 * most[1]


@pytest.mark.parametrize("seed", range(5))
def test_conservative_never_preempts(seed: int) -> None:
    replica = make_replica(kv_blocks=64, running_max=40, step_tokens_max=64, admit="conservative")
    assert run(replica, load(40, seed))[-1][1] == 0


def test_conservative_counts_what_is_promised() -> None:
    """64 blocks of 4 tokens: each request may come to 100 + 29 of them, so one and not two."""
    replica = make_replica(kv_blocks=64, running_max=40, step_tokens_max=64, admit="conservative")
    for index in range(3):
        replica.submit(Request(f"r{index}", 8, 125, 0.0, prompt_tokens=[index] * 8), 0.0)
    replica.plan(0.0)
    assert replica.running_count == 1
    replica = make_replica(kv_blocks=66, running_max=40, step_tokens_max=64, admit="conservative")
    for index in range(3):
        replica.submit(Request(f"r{index}", 8, 125, 0.0, prompt_tokens=[index] * 8), 0.0)
    replica.plan(0.0)
    assert replica.running_count == 2


def test_aggressive_starts_with_the_first_chunk() -> None:
    prompts = load(12, 2, prompt=(60, 60), output=(20, 20))
    replica = make_replica(kv_blocks=64, running_max=40, step_tokens_max=16, admit="aggressive")
    assert run(replica, prompts)[-1][1] > 0
    replica = make_replica(kv_blocks=64, running_max=40, step_tokens_max=16, admit="conservative")
    assert run(replica, prompts)[-1][1] == 0


# ---- on views made by hand ----------------------------------------------------------------------------


def candidate_of(prompt_len: int, cached_len: int = 0, cached: int = 0, revived: int = 0) -> Candidate:
    request = Request("r", prompt_len, 10, 0.0)
    return Candidate(Standing(request, 9), cached_len, cached, revived)


def pool(available: int, running_count: int) -> Any:
    """Of 200 blocks of four tokens; a step takes 32 tokens."""
    return SimpleNamespace(
        blocks_available=available,
        block_count=200,
        block_tokens=4,
        step_tokens_max=32,
        running_count=running_count,
        running=[],
    )


def started_with(name: str, candidate: Candidate, view: Any, **options: float) -> int | None:
    """Tokens of KV that it starts with; None: it waits."""
    decision = REGISTRIES["admit"].make(name, options=options).decide(candidate, view, 0.0)
    assert (decision.reason is None) == (decision.reserve_len > 0)
    return decision.reserve_len or None


def test_aggressive_asks_for_the_first_chunk_above_its_watermark() -> None:
    """Eight blocks for the 32 tokens of a step, and two of the 200 left free where others run."""
    long = candidate_of(100)
    assert started_with("aggressive", long, pool(10, 1)) == 32
    assert started_with("aggressive", long, pool(9, 1)) is None
    assert started_with("aggressive", long, pool(8, 0)) == 32, "alone it may have all"
    assert started_with("aggressive", long, pool(7, 0)) is None
    assert started_with("aggressive", long, pool(18, 1), watermark_frac=0.05) == 32
    assert started_with("aggressive", long, pool(17, 1), watermark_frac=0.05) is None
    assert started_with("aggressive", candidate_of(9), pool(5, 1)) == 9, (
        "all that is known, where that is less"
    )


def test_aggressive_counts_what_is_cached_once_and_what_it_takes_back() -> None:
    """Ten blocks are cached, four of which nobody holds now: 8 more and these 4."""
    found = candidate_of(100, cached_len=40, cached=10, revived=4)
    assert started_with("aggressive", found, pool(14, 1)) == 72
    assert started_with("aggressive", found, pool(13, 1)) is None


def test_a_whole_prompt_has_all_its_blocks_above_the_watermark() -> None:
    found = candidate_of(100, cached_len=40, cached=10, revived=4)
    assert started_with("whole-prompt", found, pool(21, 1)) == 100
    assert started_with("whole-prompt", found, pool(20, 1)) is None
    assert started_with("whole-prompt", found, pool(19, 0)) == 100
    assert started_with("whole-prompt", found, pool(18, 0)) is None


def test_conservative_leaves_what_was_promised_and_alone_takes_what_is_there() -> None:
    """A request of 100 + 10 tokens may come to 28 blocks; the one that runs has 4 of its 13."""
    assert started_with("conservative", candidate_of(100), pool(25, 0)) == 100
    assert started_with("conservative", candidate_of(100), pool(24, 0)) is None
    running = [Standing(Request("s", 40, 12, 0.0), 1, block_count=4)]
    for available, cached, starts in ((37, 0, True), (36, 0, False), (31, 10, True), (30, 10, False)):
        view = pool(available, 1)
        view.running = running
        found = candidate_of(100, cached_len=4 * cached, cached=cached, revived=4 if cached else 0)
        assert started_with("conservative", found, view) == (100 if starts else None)
