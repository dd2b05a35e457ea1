"""Just-in-time service: the tokens that will count, for each second of work they still cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock.core.metrics import Slo
from penstock.core.reasons import FinishReason
from penstock.core.settings import setting
from penstock.core.units import ceil_div
from penstock.policies.context import Context
from penstock.policies.estimate.lengths import LengthBelief
from penstock.policies.estimate.slo_book import Promise, SloBook
from penstock.policies.estimate.step_time import StepTimes, chunk_pairs
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.rank.service_jobs import (
    NEVER,
    Dues,
    Job,
    StepClock,
    Tier,
    best_window,
    drop,
    merge_programs,
)
from penstock.policies.view import ReplicaView, SequenceView, StepFacts

PREFILL_WEIGHT, DECODE_WEIGHT = 1.0, 8.0  # of a token; published
_RATIO_MIN: Final = 1e-6  # published
_KINDS_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class JitServeOptions:
    quantile: float = setting(0.95, "of the output length that a request is planned with", low=0.5, high=1.0)
    schedule_steps: int = setting(50, "steps between two choices of the batch", low=1, high=10_000)
    schedule_ms: float = setting(1000.0, "and at most so long, where steps are slow", low=1.0, high=600_000.0)
    top_factor: float = setting(
        1.5, "candidates among which requests of like length are looked for, as a multiple of the batch",
        low=1.0, high=16.0,
    )  # fmt: skip
    margin_frac: float = setting(
        1.0, "time kept in hand before a request must be served, as a share of its work left",
        low=0.0, high=10.0,
    )  # fmt: skip
    exponent: float = setting(1.0, "how fast the reward of what will be late decays", low=0.0, high=16.0)
    swap_gain: float = setting(
        1.5, "a waiting request displaces a running one of so many times less priority", low=1.0, high=100.0
    )
    assumed_ttft_ms: float = setting(
        0.0, "target of the first token for requests that were promised nothing; 0: none", low=0.0, high=1e8
    )
    assumed_tpot_ms: float = setting(
        0.0, "the same for the mean gap between tokens; 0: none", low=0.0, high=1e6
    )
    step_ms: float = setting(20.0, "time of a step until some were measured", low=1e-3, high=1e5)


@RANK.register("jitserve", source="JITServe (NSDI 2026), jitserve/scheduler/policy.py and slo_scheduler.py")
class JitServe(Rank):
    """Most service goodput: tokens of requests that meet their targets, a prompt's 1 and an output's 8.

    Every `schedule_steps` steps or `schedule_ms`, if somebody waits, all that wait and run are judged again:

        out     what the output stays below with probability `quantile`, given what there is (`LengthBelief`)
        R       v (tokens left + steps of its prompt left), v the mean step time of the last 10 frames
        ratio   min(1, time it has / time it will have taken), for its first token and for its end (`SloBook`)
        reward  a latency promise: in ratio(first) + 8 out ratio(end), and what is earned counts in full;
                else (in + 8 out) ratio(end); ratios to the power `exponent`; next to nothing without promise
        priority = reward / R; calls of one program share theirs, sum of rewards / largest R

    The frame is then chosen:

        kept    all, less who earns least for its work as long as the rest cannot all be in time, with the
                room that decodes leave to prompts, the slots, and the KV (Moore and Hodgson)
        due     of these, whose slack is less than this frame and `margin_frac` times the work left: the
                latest start first
        chosen  for free places, of the best `top_factor` times as many, the window of like lengths with the
                largest sum of priorities; and as many calls of a program as its work needs on average

    then the other kept ones, then those left out, by priority; then what has missed a target for good, which
    is served when there is room. So who has slack waits, and what cannot be in time costs nobody else. Last
    of all who was promised nothing and has a `priority` above 0, as the requests of batches have.

    Who waits and is due or chosen outranks who runs and is neither, if it would be late without a place in
    this frame, if the other is late, or for `swap_gain` times the priority. It takes a `preempt` policy that
    makes room (`priority`, which bounds swaps by step and request). O(n log n) a frame, some 7 µs a request;
    in between, a new one has the priority it came with.

    Differs from the source: the quantile is the empirical one, not a forest's; the true length, which the
    published predictor reads, is never read; the window looks for the largest sum (the published code sorts
    negatives, and finds the smallest); each call of a program has its own deadline; whom to leave out is
    decided by feasibility, where the published density alone never tells who is urgent; slots are not
    reduced when steps are slow, which is what `compose = "ms-budget"` is for.
    """

    Options = JitServeOptions
    _view: ReplicaView

    def __init__(self, context: Context, options: JitServeOptions) -> None:
        self._options = options
        self._assumed = Slo(options.assumed_ttft_ms or None, options.assumed_tpot_ms or None)
        self._belief = context.shared(LengthBelief)
        self._book = context.shared(SloBook)
        self._times = context.shared(StepTimes)
        self._clock = StepClock(options.step_ms * 1e-3, options.schedule_steps, options.schedule_ms * 1e-3)
        self._sequences: dict[int, SequenceView] = {}  # all that are here, by arrival index
        self._dues: dict[int, Dues] = {}
        self._room = 1  # prompt tokens in a step beside all that decode now
        self._prompt_step_s = options.step_ms * 1e-3  # of such a step
        self._kinds: dict[tuple[str, str, int], Sequence[int]] = {}  # outputs to expect of new requests
        self._kinds_version = -1
        self._jobs: dict[int, Job] = {}  # the same, as of the last frame or of when they came
        self._version = 0

    # ---- what happens ---------------------------------------------------------------------------------

    def attached(self, view: ReplicaView) -> None:
        self._view = view

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        self._clock.resume(now_s, was_idle=not self._sequences)
        self._sequences[sequence.arrival_index] = sequence
        self._dues[sequence.arrival_index] = Dues(sequence.request, self._book, self._assumed)
        self._look_at_room()
        self._jobs[sequence.arrival_index] = self._judge(sequence, now_s)

    def stepped(self, step: StepFacts, now_s: float) -> None:
        self._clock.advance(step.steps, now_s)

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        who = sequence.arrival_index
        del self._sequences[who], self._dues[who], self._jobs[who]

    def steps_valid(self, view: ReplicaView, now_s: float) -> int:
        return self._clock.steps_to_frame

    # ---- the order ------------------------------------------------------------------------------------

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        job = self._jobs[sequence.arrival_index]
        if job.tier is Tier.DUE or job.tier is Tier.KEPT:
            return (job.tier, job.by_s, job.left_s)
        return (job.tier, -job.priority, job.left_s)

    def version(self, now_s: float) -> int:
        if self._clock.frame_is_due:
            self._clock.begin_frame()
            if self._view.waiting_count:  # else all that are here run
                self._choose(now_s)
                self._version += 1
        return self._version

    def outranks(self, head: SequenceView, other: SequenceView, now_s: float) -> bool:
        ours, theirs = self._jobs[head.arrival_index], self._jobs[other.arrival_index]
        if ours.tier > Tier.CHOSEN or theirs.tier <= Tier.CHOSEN:
            return False
        if ours.slack_s < self._clock.frame_s + self._clock.step_s or theirs.tier >= Tier.LATE:
            return True
        return ours.priority >= self._options.swap_gain * theirs.priority

    def _choose(self, now_s: float) -> None:
        """Judge everybody, and choose the batch of this frame."""
        self._look_at_room()
        jobs = [self._judge(sequence, now_s) for sequence in self._sequences.values()]
        self._jobs = {job.sequence.arrival_index: job for job in jobs}
        programs = merge_programs(jobs)
        hopeful = sorted((job for job in jobs if job.tier < Tier.LATE), key=Job.by_priority)
        places = self._places(hopeful)
        for job in hopeful:
            job.tier, job.cost_s = Tier.KEPT, job.prompt_s + job.left_s / places
        drop(hopeful, [job.slack_s + job.prompt_s for job in hopeful], [job.prompt_s for job in hopeful])
        if len(hopeful) > places:
            ends_s = [job.slack_s + job.left_s for job in hopeful]
            drop(hopeful, ends_s, [job.work_s / places for job in hopeful])
        kept = [job for job in hopeful if job.tier is Tier.KEPT]
        for job in kept:
            if job.slack_s < self._reserve_s(job):
                job.tier = Tier.DUE
        for calls in programs:
            self._top_up(calls, now_s)
        free = places - sum(job.tier <= Tier.CHOSEN for job in kept)
        rest = [job for job in kept if job.tier is Tier.KEPT]
        for job in best_window(rest[: int(self._options.top_factor * free)], free):
            job.tier = Tier.CHOSEN

    def _reserve_s(self, job: Job) -> float:
        """With less slack it must not wait, nor be displaced, until the next frame."""
        step_s, again = self._clock.step_s, 0
        if job.sequence.block_count:  # it would have to be computed again
            again += ceil_div(job.sequence.total_len, self._room)
        again_s = step_s + self._prompt_step_s * again
        return self._clock.frame_s + again_s + self._options.margin_frac * job.left_s

    def _look_at_room(self) -> None:
        """A step full of prompts beside all that decode: how many tokens, and how long it will take."""
        view = self._view
        decodes = view.decoding_count
        self._room = max(1, view.step_tokens_max - decodes)
        self._prompt_step_s = self._clock.step_s
        if self._times.is_ready:  # on a slow device such a step takes many times the mean
            pairs = chunk_pairs(self._room, self._room)
            seconds = self._times.seconds(decodes + self._room, decodes + 1, view.decode_context, pairs)
            self._prompt_step_s = max(self._clock.step_s, seconds)

    def _places(self, hopeful: Sequence[Job]) -> int:
        """How many of the best the replica can hold: slots, and KV for half of what they will produce."""
        view, count = self._view, 0
        tokens = view.block_count * view.block_tokens
        for job in hopeful[: view.running_max]:
            tokens -= job.sequence.total_len + job.tokens_left // 2
            if tokens < 0:
                break
            count += 1
        return max(1, count)

    def _top_up(self, calls: Sequence[Job], now_s: float) -> None:
        """A program needs so many calls in the batch, on average, until its next deadline."""
        open_calls = [job for job in calls if job.tier < Tier.LATE and job.end_s < NEVER]
        if len(open_calls) < 2:
            return  # for one call this is what being due means
        time_left_s = max(min(job.end_s for job in open_calls) - now_s, self._clock.step_s)
        needed = int(sum(job.left_s for job in open_calls) / time_left_s)
        missing = needed - sum(job.tier <= Tier.CHOSEN for job in open_calls)
        others = sorted((job for job in open_calls if job.tier is Tier.KEPT), key=lambda job: -job.left_s)
        for job in others[: max(0, missing)]:
            job.tier = Tier.CHOSEN

    # ---- one request ----------------------------------------------------------------------------------

    def _judge(self, sequence: SequenceView, now_s: float) -> Job:
        """Its reward, the work it still takes, and the time it can spare."""
        request, step_s = sequence.request, self._clock.step_s
        due = self._dues[sequence.arrival_index]
        produced, total_len = sequence.output_len, sequence.total_len
        least, middle, most = self._totals(sequence, produced)
        uncomputed = 0 if sequence.is_decoding else total_len - sequence.computed_len
        prompt_s = self._prompt_step_s * ceil_div(uncomputed, self._room)
        job = Job(sequence, max(step_s, prompt_s + step_s * (most - produced)))
        job.length = request.prompt_len + most
        job.tokens_left = middle - produced
        job.prompt_s = self._prompt_step_s * uncomputed / self._room
        job.work_s = prompt_s + step_s * job.tokens_left
        # Its first token, and the ends of the shortest and the longest output: when due, when possible
        reached_s = sequence.first_token_s
        first_s = now_s + prompt_s + step_s if reached_s is None else reached_s
        soon_s = now_s + prompt_s + step_s * (least - produced)
        soon_due_s, job.end_s = due.end_s(least, reached_s), due.end_s(most, reached_s)
        job.slack_s = min(soon_due_s - soon_s, job.end_s - now_s - job.left_s)
        if reached_s is None:
            job.slack_s = min(job.slack_s, due.first_s - first_s)
        job.by_s = now_s + job.slack_s
        is_late = first_s > due.first_s or soon_s > soon_due_s
        job.tier = Tier.BACKGROUND if due.is_background else Tier.LATE if is_late else Tier.OTHERS
        arrival_s = request.arrival_s
        on_end = self._ratio(job.end_s - arrival_s, now_s + job.left_s - arrival_s)
        prompt = PREFILL_WEIGHT * request.prompt_len
        if due.promise is Promise.LATENCY:
            on_first = self._ratio(due.first_s - arrival_s, first_s - arrival_s)
            earned = prompt * on_first + DECODE_WEIGHT * produced
            job.reward = earned + DECODE_WEIGHT * (most - produced) * on_end
        else:
            counts = _RATIO_MIN if due.promise is Promise.NONE else on_end
            job.reward = (prompt + DECODE_WEIGHT * most) * counts
        job.priority = job.reward / job.left_s
        return job

    def _totals(self, sequence: SequenceView, produced: int) -> Sequence[int]:
        """Least, middle and most output. All new requests of a kind are alike until somebody ends."""
        if produced == 0:
            request, version = sequence.request, self._belief.version
            kind = request.tenant, request.slo_class, request.max_output_tokens
            if version != self._kinds_version or len(self._kinds) >= _KINDS_MAX:
                self._kinds_version, self._kinds = version, {}
            if kind not in self._kinds:
                self._kinds[kind] = self._totals_now(sequence, 0)
            return self._kinds[kind]
        return self._totals_now(sequence, produced)

    def _totals_now(self, sequence: SequenceView, produced: int) -> Sequence[int]:
        quantile = self._options.quantile
        least, middle, most = self._belief.at(sequence, (1.0 - quantile, 0.5, quantile))
        if least == sequence.request.max_output_tokens:
            least = produced + 1  # nothing is known that would call it late
        return least, middle, most

    def _ratio(self, given_s: float, taken_s: float) -> float:
        """1 in time, and less the later."""
        if taken_s <= given_s:
            return 1.0
        ratio: float = max(given_s / taken_s, _RATIO_MIN) ** self._options.exponent
        return ratio
