"""Requests as JITServe judges them, the choices among them, and its clock."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Final

from penstock.core.metrics import Slo
from penstock.core.request import Request
from penstock.policies.estimate.slo_book import SloBook, promise_of
from penstock.policies.view import SequenceView

NEVER: Final = float("inf")
CLOCK_FRAMES: Final = 10  # published
_STEP_S_MIN: Final = 1e-6


class Tier(IntEnum):
    """Of the order, first to last."""

    DUE = 0  # served now, or late
    CHOSEN = 1
    KEPT = 2  # can be in time, and has slack
    OTHERS = 3  # left out, so that the others can be in time
    LATE = 4  # has missed a target for good
    BACKGROUND = 5  # was promised nothing, and asked to come after others


class Job:
    """A request as it was judged. Times are seconds of work, or instants on the request's clock."""

    __slots__ = (
        "by_s", "cost_s", "end_s", "left_s", "length", "priority", "prompt_s", "reward", "sequence",
        "slack_s", "tier", "tokens_left", "work_s",
    )  # fmt: skip

    def __init__(self, sequence: SequenceView, left_s: float) -> None:
        self.sequence = sequence
        self.left_s = left_s  # most of the work that is left
        self.work_s = left_s  # the work that is likely left
        self.prompt_s = 0.0  # of that, its prompt in steps that nobody shares
        self.cost_s = left_s  # of the device: of the steps' room, and of a place
        self.end_s = NEVER  # when its longest output is due
        self.slack_s = NEVER  # what it can wait and still be in time
        self.by_s = NEVER  # when it must be served at last
        self.tokens_left = 0  # likely
        self.length = 0  # prompt and longest output, tokens
        self.reward = 0.0
        self.priority = 0.0
        self.tier = Tier.OTHERS

    def by_priority(self) -> tuple[float, float, int]:
        """The best first."""
        return (-self.priority, self.left_s, self.sequence.arrival_index)


def merge_programs(jobs: Iterable[Job]) -> list[list[Job]]:
    """The calls of each program that is here. From now on they share one priority."""
    programs: defaultdict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in jobs:
        request = job.sequence.request
        if request.program_id is not None:
            programs[request.tenant, request.program_id].append(job)
    for calls in programs.values():
        priority = sum(job.reward for job in calls) / max(job.left_s for job in calls)
        for job in calls:
            job.priority = priority
    return list(programs.values())


def drop(jobs: Sequence[Job], due_s: Sequence[float], works_s: Sequence[float]) -> None:
    """Of those kept, leave out who earns least for its cost until the others can be in time, one by one.

    `works_s`: what each takes of the one resource in question; `due_s`: in how many seconds it must be done.
    Moore and Hodgson's rule with rewards: in order of what is due, and where that cannot be done, the
    cheapest so far goes. Who decodes stays. O(n log n).
    """
    heap: list[tuple[float, int]] = []
    total_s = 0.0
    kept = [place for place, job in enumerate(jobs) if job.tier is Tier.KEPT and works_s[place] > 0.0]
    for place in sorted(kept, key=lambda place: (due_s[place], jobs[place].sequence.arrival_index)):
        job = jobs[place]
        total_s += works_s[place]
        if not job.sequence.is_decoding:
            heapq.heappush(heap, (job.reward / job.cost_s, place))
        while heap and total_s > due_s[place]:
            dropped = heapq.heappop(heap)[1]
            total_s -= works_s[dropped]
            jobs[dropped].tier = Tier.OTHERS


def best_window(jobs: Sequence[Job], size: int) -> Sequence[Job]:
    """Of `jobs` by length, the `size` neighbours with the largest sum of priorities. O(n log n)."""
    if size <= 0:
        return ()
    if len(jobs) <= size:
        return jobs
    by_length = sorted(jobs, key=lambda job: (job.length, job.sequence.arrival_index))
    total = best = sum(job.priority for job in by_length[:size])
    begin = 0
    for end in range(size, len(by_length)):
        total += by_length[end].priority - by_length[end - size].priority
        if total > best:
            best, begin = total, end - size + 1
    return by_length[begin : begin + size]


class Dues:
    """What one request was promised, or is `assumed` where nothing was, as instants."""

    __slots__ = ("_answer_s", "_pace_s", "first_s", "is_background", "promise")

    def __init__(self, request: Request, book: SloBook, assumed: Slo) -> None:
        slo = book.of(request)
        self.is_background = slo.is_empty and request.priority > 0
        if slo.is_empty and not self.is_background:
            slo = assumed
        self.promise = promise_of(slo, request)
        self.first_s = _instant(request, slo.ttft_ms)
        self._answer_s = _instant(request, slo.e2e_ms)
        self._pace_s = None if slo.tpot_ms is None else slo.tpot_ms * 1e-3

    def end_s(self, total: int, reached_s: float | None) -> float:
        """When the last of `total` tokens is due; the pace counts from the first one."""
        if self._pace_s is None:
            return self._answer_s
        begun_s = self.first_s if reached_s is None else reached_s
        return min(self._answer_s, begun_s + (total - 1) * self._pace_s)


def _instant(request: Request, target_ms: float | None) -> float:
    return NEVER if target_ms is None else request.arrival_s + target_ms * 1e-3


class StepClock:
    """Counts steps in frames, and knows the mean time of a step over the last of them, idle time left out.

    A frame has `frame_steps` steps, or as many as fit into `frame_s_max` where those are fewer. From the
    instants at which steps end, so that it is the same however steps are told.
    """

    def __init__(self, step_s: float, frame_steps: int, frame_s_max: float) -> None:
        self._frame_steps_max = frame_steps
        self._frame_s_max = frame_s_max
        self._samples: deque[float] = deque(maxlen=CLOCK_FRAMES)
        self._done = 0
        self._begun_s = 0.0
        self._last_s = 0.0
        self.step_s = step_s
        self._frame_steps = self._steps_of_a_frame()

    @property
    def frame_s(self) -> float:
        return self.step_s * self._frame_steps

    @property
    def steps_to_frame(self) -> int:
        return max(1, self._frame_steps - self._done)

    @property
    def frame_is_due(self) -> bool:
        return self._done >= self._frame_steps

    def resume(self, now_s: float, was_idle: bool) -> None:
        """A request came; if nobody was here, nothing has been computed since the last step."""
        if was_idle:
            self._begun_s += now_s - self._last_s
            self._last_s = now_s

    def advance(self, steps: int, now_s: float) -> None:
        self._done += steps
        self._last_s = now_s

    def begin_frame(self) -> None:
        self._samples.append((self._last_s - self._begun_s) / self._done)
        self._begun_s, self._done = self._last_s, 0
        self.step_s = max(_STEP_S_MIN, sum(self._samples) / len(self._samples))
        self._frame_steps = self._steps_of_a_frame()

    def _steps_of_a_frame(self) -> int:
        return max(1, min(self._frame_steps_max, int(self._frame_s_max / self.step_s)))
