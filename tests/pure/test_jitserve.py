"""JITServe's parts: rewards and priorities by the published formulas, and its choices against brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.metrics import Slo
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.policies.context import Context
from penstock.policies.estimate.slo_book import SloBook
from penstock.policies.rank import RANK
from penstock.policies.rank.jitserve import JitServe
from penstock.policies.rank.service_jobs import Dues, Job, Tier, best_window, drop, merge_programs
from penstock.policies.view import StepFacts

STEP_S = 0.02


@dataclass
class Seq:
    request: Request
    arrival_index: int
    output_len: int = 0
    block_count: int = 0
    first_token_s: float | None = None

    @property
    def is_decoding(self) -> bool:
        return self.output_len > 0

    @property
    def total_len(self) -> int:
        return self.request.prompt_len + self.output_len

    @property
    def computed_len(self) -> int:
        return self.total_len - 1 if self.is_decoding else 0


@dataclass
class View:
    waiting_count: int = 0
    running_max: int = 8
    block_count: int = 1000
    block_tokens: int = 16
    step_tokens_max: int = 512
    decoding_count: int = 0


def make(**options: Any) -> JitServe:
    policy = RANK.make("jitserve", Context(), {"step_ms": STEP_S * 1e3, **options})
    assert isinstance(policy, JitServe)
    policy.attached(View())  # type: ignore[arg-type]
    return policy


def seq(index: int, output: int, prompt: int = 100, produced: int = 0, **hints: Any) -> Seq:
    """A cold belief expects the maximum, so lengths are known."""
    first = 0.0 if produced else None
    return Seq(Request(f"r{index}", prompt, output, 0.0, **hints), index, produced, 0, first)


def judged(policy: JitServe, sequence: Seq, now_s: float = 0.0) -> Job:
    policy._dues[sequence.arrival_index] = Dues(sequence.request, policy._book, policy._assumed)
    policy._room = 512
    return policy._judge(sequence, now_s)  # type: ignore[arg-type]


CHAT, JOB = Slo(ttft_ms=2000, tpot_ms=100), Slo(e2e_ms=20_000)


def test_rewards_and_priorities_are_the_published_ones() -> None:
    policy = make()
    job = judged(policy, seq(0, 200, slo=JOB))
    assert job.left_s == pytest.approx(201 * STEP_S)
    assert job.reward == 100 + 8 * 200 and job.priority == pytest.approx(job.reward / job.left_s)
    late = judged(policy, seq(0, 200, slo=JOB), now_s=19.0)
    assert late.reward == pytest.approx((100 + 8 * 200) * 20 / (19 + 201 * STEP_S))
    chat = judged(policy, seq(0, 200, slo=CHAT), now_s=1.0)
    assert chat.reward == 100 + 8 * 200
    begun = judged(policy, seq(0, 200, produced=50, slo=CHAT), now_s=1.0)
    assert begun.reward == 100 + 8 * 50 + 8 * 150 and begun.left_s == pytest.approx(150 * STEP_S)
    assert judged(policy, seq(0, 200)).reward < 0.01


def test_a_missed_first_token_decays_the_prompts_part() -> None:
    chat = judged(make(), seq(0, 200, slo=Slo(ttft_ms=1000)), now_s=3.0)
    assert chat.reward == pytest.approx(100 * 1.0 / (3.0 + 2 * STEP_S) + 8 * 200)
    assert chat.tier is Tier.LATE


@given(st.integers(1, 799), st.integers(1, 799), st.integers(1, 512))
@settings(max_examples=100, deadline=None)
def test_priority_falls_with_the_work_left_and_rises_with_the_reward(
    one: int, other: int, prompt: int
) -> None:
    """Of two chats in time and of one reward, the one with less work left; of one work, the larger reward."""
    policy = make()
    ours, theirs = (judged(policy, seq(0, 800, produced=produced, slo=CHAT)) for produced in (one, other))
    assert ours.reward == theirs.reward
    assert (ours.priority > theirs.priority) == (one > other)
    big = judged(policy, seq(0, 100, prompt=512, slo=JOB))
    small = judged(policy, seq(1, 100, prompt=prompt, slo=JOB))
    assert big.left_s == small.left_s and (big.priority > small.priority) == (prompt < 512)


def test_the_calls_of_a_program_share_one_priority() -> None:
    policy = make()
    jobs = [judged(policy, seq(i, 100 * (i + 1), slo=JOB, program_id="p")) for i in range(3)]
    alone = judged(policy, seq(3, 50, slo=JOB))
    merge_programs([*jobs, alone])
    assert {job.priority for job in jobs} == {sum(job.reward for job in jobs) / jobs[2].left_s}
    assert alone.priority == alone.reward / alone.left_s


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 99)), max_size=12), st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_the_window_has_the_largest_sum(items: list[tuple[int, int]], size: int) -> None:
    jobs = []
    for index, (length, priority) in enumerate(items):
        job = Job(seq(index, 1), 1.0)  # type: ignore[arg-type]
        job.length, job.priority = length, float(priority)
        jobs.append(job)
    chosen = best_window(jobs, size)
    assert len(chosen) == min(size, len(jobs))
    ordered = sorted(jobs, key=lambda job: (job.length, job.sequence.arrival_index))
    windows = [ordered[i : i + size] for i in range(max(1, len(ordered) - size + 1))]
    best = max((sum(job.priority for job in window) for window in windows), default=0.0)
    assert sum(job.priority for job in chosen) == best


works_and_dues = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=9
)


def kept_of(items: list[tuple[int, int, int]]) -> list[int]:
    """Whom `drop` leaves, of items of (work of one resource, when it must be done, reward)."""
    jobs = []
    for index, (work, _, reward) in enumerate(items):
        job = Job(seq(index, 1), float(work))  # type: ignore[arg-type]
        job.tier, job.reward = Tier.KEPT, float(reward)
        jobs.append(job)
    drop(jobs, [float(due) for _, due, _ in items], [float(work) for work, _, _ in items])
    return [index for index, job in enumerate(jobs) if job.tier is Tier.KEPT]


@given(works_and_dues)
@settings(max_examples=200, deadline=None)
def test_what_is_kept_can_be_in_time_and_nothing_is_left_out_needlessly(
    items: list[tuple[int, int, int]],
) -> None:
    """Brute force says whether everything could be done."""
    kept = kept_of(items)
    assert is_feasible(kept, items)
    if is_feasible(list(range(len(items))), items):
        assert len(kept) == len(items)


@given(works_and_dues)
@settings(max_examples=100, deadline=None)
def test_of_equal_rewards_as_many_as_possible_are_kept(items: list[tuple[int, int, int]]) -> None:
    """The case that Moore and Hodgson solve: no larger set can be in time."""
    alike = [(work, due, 1) for work, due, _ in items]
    larger = itertools.combinations(range(len(alike)), len(kept_of(alike)) + 1)
    assert not any(is_feasible(list(chosen), alike) for chosen in larger)


def is_feasible(chosen: list[int], items: list[tuple[int, int, int]]) -> bool:
    """By deadline, which is optimal on one resource, all are in time."""
    ordered = sorted((items[index] for index in chosen), key=lambda item: item[1])
    ends = itertools.accumulate(work for work, _, _ in ordered)
    return all(end <= due for end, (_, due, _) in zip(ends, ordered, strict=True))


def test_the_pace_counts_from_the_first_token() -> None:
    promised = Slo(ttft_ms=1000, tpot_ms=100, e2e_ms=15_000)
    due = Dues(seq(0, 200, slo=promised).request, SloBook(Context()), Slo())
    assert due.end_s(11, None) == pytest.approx(2.0) and due.end_s(11, 0.5) == pytest.approx(1.5)
    assert due.end_s(200, 0.5) == 15.0


# ---- frames -------------------------------------------------------------------------------------------


def frame(policy: JitServe, now_s: float, steps: int = 50) -> int:
    policy.stepped(StepFacts((), 1, 1, steps, steps * STEP_S), now_s)
    return policy.version(now_s)


def test_the_order_stands_for_a_frame() -> None:
    policy = make()
    policy._view.waiting_count = 1  # type: ignore[misc]
    policy.submitted(seq(0, 100, slo=JOB), 0.0)  # type: ignore[arg-type]
    assert policy.version(0.0) == policy.version(0.5) == 0
    policy.stepped(StepFacts((), 1, 1, 30, 0.6), 0.6)
    assert policy.version(0.6) == 0 and policy.steps_valid(View(), 0.6) == 20  # type: ignore[arg-type]
    assert frame(policy, 1.0, 20) == 1 and policy.steps_valid(View(), 1.0) == 50  # type: ignore[arg-type]


def test_the_clock_is_the_mean_of_its_frames_without_idle_time() -> None:
    policy, first, second = make(), seq(0, 100, slo=JOB), seq(1, 100, slo=JOB)
    policy.submitted(first, 5.0)  # type: ignore[arg-type]
    frame(policy, 6.5)
    assert policy._clock.step_s == pytest.approx(0.03)
    policy.finished(first, FinishReason.STOP, 6.5)  # type: ignore[arg-type]
    policy.submitted(second, 100.0)  # type: ignore[arg-type]
    frame(policy, 100.5)
    assert policy._clock.step_s == pytest.approx((0.03 + 0.01) / 2)


def test_due_goes_first_and_late_goes_last() -> None:
    policy = make()
    policy._view.waiting_count = 4  # type: ignore[misc]
    slack = seq(0, 100, slo=Slo(e2e_ms=60_000))
    due = seq(1, 100, slo=Slo(e2e_ms=4_000))
    late = seq(2, 100, slo=Slo(e2e_ms=500))
    nothing = seq(3, 100)
    everybody = [slack, due, late, nothing]
    for each in everybody:
        policy.submitted(each, 0.0)  # type: ignore[arg-type]
    frame(policy, 1.0)
    order = sorted(everybody, key=lambda each: policy.key(each, 1.0))  # type: ignore[arg-type]
    assert [each.arrival_index for each in order] == [1, 0, 3, 2]
    assert policy.outranks(due, late, 1.0)  # type: ignore[arg-type]
    assert not policy.outranks(late, slack, 1.0)  # type: ignore[arg-type]


def test_nobody_is_displaced_who_would_be_late_for_it() -> None:
    policy = make()
    policy._view.waiting_count, policy._view.running_max = 1, 1  # type: ignore[misc]
    running = seq(0, 100, produced=50, slo=Slo(e2e_ms=2_200))
    running.block_count = 10
    head = seq(1, 20, slo=Slo(e2e_ms=1_700))
    for each in (running, head):
        policy.submitted(each, 0.0)  # type: ignore[arg-type]
    frame(policy, 1.0)
    assert not policy.outranks(head, running, 1.0)  # type: ignore[arg-type]


def test_who_outranks_whom() -> None:
    """A head that is due or chosen, over who is neither: when it cannot wait, or for half as much again."""
    policy, head, other = make(), seq(0, 100), seq(1, 100)  # a frame takes 1 s

    def outranks(tier: Tier, slack_s: float, priority: float, over: Tier) -> bool:
        ours, theirs = Job(head, 1.0), Job(other, 1.0)  # type: ignore[arg-type]
        ours.tier, ours.slack_s, ours.priority = tier, slack_s, priority
        theirs.tier, theirs.priority = over, 2.0
        policy._jobs = {0: ours, 1: theirs}
        return policy.outranks(head, other, 0.0)  # type: ignore[arg-type]

    assert [tier for tier in Tier if outranks(tier, 9.0, 3.0, Tier.KEPT)] == [Tier.DUE, Tier.CHOSEN]
    assert not outranks(Tier.CHOSEN, 9.0, 2.9, Tier.KEPT)
    assert outranks(Tier.CHOSEN, 0.9, 0.0, Tier.KEPT) and outranks(Tier.CHOSEN, 9.0, 0.0, Tier.LATE)
    assert not any(outranks(Tier.DUE, 0.0, 99.0, over) for over in (Tier.DUE, Tier.CHOSEN))


def test_a_program_is_given_as_many_places_as_its_work_needs() -> None:
    """12 s of work are left and 5 s to do it in: two calls at a time, those with most work left."""
    policy = make()
    calls = [judged(policy, seq(i, 100 * (i + 1), slo=Slo(e2e_ms=10_000), program_id="p")) for i in range(3)]
    for due, chosen in ((None, [1, 2]), (2, [1])):
        for index, call in enumerate(calls):
            call.tier = Tier.DUE if index == due else Tier.KEPT
        policy._top_up(calls, 5.0)
        assert [index for index, call in enumerate(calls) if call.tier is Tier.CHOSEN] == chosen


def test_places_end_with_the_slots_or_with_the_kv() -> None:
    """Each will hold 100 tokens of prompt and half of the 100 of its output, in the mean."""
    policy = make()
    jobs = [judged(policy, seq(index, 100)) for index in range(10)]
    for block_count, places in ((1000, 8), (20, 2), (1, 1)):
        policy._view.block_count = block_count  # type: ignore[misc]
        assert policy._places(jobs) == places


def test_who_runs_is_due_earlier_by_what_it_would_compute_again() -> None:
    policy, runs = make(), seq(0, 100, produced=50, prompt=1000)
    waits = seq(1, 100, produced=50, prompt=1000)
    runs.block_count = 66
    reserves_s = [policy._reserve_s(judged(policy, each)) for each in (waits, runs)]
    assert reserves_s[0] == pytest.approx(50 * STEP_S + STEP_S + 50 * STEP_S), "a frame, a step, its work"
    assert reserves_s[1] - reserves_s[0] == pytest.approx(3 * STEP_S), "1,050 tokens in steps of 512"


def test_who_was_promised_nothing_may_be_taken_for_a_chat() -> None:
    policy = make(assumed_ttft_ms=2000, assumed_tpot_ms=100)
    for now_s in (0.0, 1.0, 5.0):
        assumed, said = (judged(policy, seq(0, 200, slo=slo), now_s) for slo in (None, CHAT))
        assert (assumed.reward, assumed.by_s, assumed.tier) == (said.reward, said.by_s, said.tier)
    job = judged(policy, seq(1, 200, slo=JOB), now_s=1.0)
    assert job.reward == judged(make(), seq(1, 200, slo=JOB), now_s=1.0).reward


def test_a_batch_is_behind_everybody_and_gives_way_but_keeps_what_it_was_promised() -> None:
    policy = make(assumed_ttft_ms=2000, assumed_tpot_ms=100)
    batch, chat = seq(0, 200, priority=1_000_000), seq(1, 200)
    late = seq(2, 200, slo=Slo(ttft_ms=1.0))
    for each in (batch, chat, late):
        policy._jobs[each.arrival_index] = judged(policy, each, now_s=1.0)
    order = sorted((batch, chat, late), key=lambda each: policy.key(each, 1.0))  # type: ignore[arg-type]
    assert order == [chat, late, batch]
    policy._jobs[1].tier = Tier.CHOSEN
    assert policy.outranks(chat, batch, 1.0)  # type: ignore[arg-type]
    assert not policy.outranks(batch, late, 1.0)  # type: ignore[arg-type]
    promised = judged(policy, seq(3, 200, priority=1_000_000, slo=JOB))
    assert promised.tier is Tier.OTHERS and promised.reward == judged(policy, seq(4, 200, slo=JOB)).reward
