"""The twin's executor of two lanes: both have a step in progress, and slow each other down while they do.

A step in progress has so much of itself `left`, and takes `seconds` as a whole while everything stays as it
is. When the other lane begins or ends a step, what is left goes on at another speed. So times are exact for
steps that overlap in part, and every instant follows from the ones before it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from penstock.core.step import StepPlan, StepResult
from penstock.policies.lanes import Lane
from penstock.replica.laned import LaneStep
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.shares import Load, SharedDevice
from penstock.twin.costs.work import StepWork
from penstock.twin.executor import ModelledExecutor, TokenTimes, _Member

_FOREVER: Final = float("inf")
_STOP_NEVER: Final = 1 << 59
_LEAP_STEPS_MAX: Final = 1024


@dataclass(slots=True)
class _InProgress:
    """One lane's step. `left` of it, at `since_s`; as a whole it takes `seconds` in the present company."""

    step: LaneStep
    work: StepWork
    load: Load
    began_s: float
    since_s: float
    left: float = 1.0
    seconds: float = 0.0

    @property
    def ends_s(self) -> float:
        return self.since_s + self.left * self.seconds


class LanedExecutor(ModelledExecutor):
    """`begin` a lane's step, move the clock with `now_s`, `end` the step at its `end_s`. Deterministic."""

    def __init__(self, cost: CostModel, output_lens: Mapping[str, int]) -> None:
        super().__init__(cost, output_lens)
        self._device = SharedDevice(cost)
        self._running: dict[Lane, _InProgress] = {}
        self._decoding = 0  # members that decode
        self._joining: dict[int, _Member] = {}  # began to decode while a decode step ran

    @property
    def next_end_s(self) -> float:
        """When the next step in progress ends, if nothing else begins."""
        return min((each.ends_s for each in self._running.values()), default=_FOREVER)

    def end_s(self, lane: Lane) -> float:
        running = self._running.get(lane)
        return _FOREVER if running is None else running.ends_s

    def has_just_begun(self, lane: Lane) -> bool:
        running = self._running.get(lane)
        return running is not None and running.began_s == self.now_s < running.ends_s

    def move_to(self, at_s: float) -> None:
        """The clock, not past the end of a step."""
        assert self.now_s <= at_s <= self.next_end_s
        self._pass(at_s)

    def _pass(self, at_s: float) -> None:
        if self._running:
            self.busy_s += at_s - self.now_s
            self.busy_joules += self._watts * (at_s - self.now_s)
        self.now_s = at_s

    def begin(self, step: LaneStep) -> None:
        """The lane's step begins now."""
        assert step.lane not in self._running
        self._take_in(step.plan)
        work = self._work_of(step.plan)
        self._start(step, work)
        self._look_closely(self._all_work())

    def end(self, lane: Lane) -> StepResult:
        """The lane's step is over, now."""
        running = self._running.pop(lane)
        self._rate()
        plan = running.step.plan
        stopped = self._end_prompts(plan) if plan.chunks else self._end_decodes(plan)
        self.steps += 1
        return StepResult(None, stopped, 1, duration_s=self.now_s - running.began_s)

    def leap(self, until_s: float) -> StepResult | None:
        """Make those steps of a decode plan that stands, and has just begun, which end before `until_s`, and
        before the other lane's step. None: there are none, and its first step goes on.

        Equals so many single steps bit for bit.
        """
        running = self._running[Lane.DECODE]
        plan, began_s, done = running.step.plan, self.now_s, 0
        limit = plan.repeat
        if self._stops:
            limit = min(limit, max(1, self._stops[0][0] - self._clock))
        until_s = min(until_s, plan.until_s)
        other = self._running.get(Lane.PREFILL)
        while running.ends_s < (until_s if other is None else min(until_s, other.ends_s)):
            if other is None and running.load.share >= 1.0:
                done += self._decode_alone(running, limit - done, until_s)
            else:
                self._advance_decodes(running.ends_s)
                done += 1
            if done == limit:
                break
            work = StepWork((), self._decoding, self._context + self._decoding, self._decoding)
            self._start(running.step, work)
            running = self._running[Lane.DECODE]
        if not done:
            return None
        self._running.pop(Lane.DECODE)
        self._rate()
        self.steps += done
        return StepResult(None, self._stopped(), done, duration_s=self.now_s - began_s)

    def finish(self, request_id: str) -> TokenTimes | None:
        seq_id = self._seq_ids.get(request_id)
        if seq_id is not None:
            self._joining.pop(seq_id, None)
        return super().finish(request_id)

    # ---- rates ----------------------------------------------------------------------------------------

    def _start(self, step: LaneStep, work: StepWork) -> None:
        load = self._device.load(work, step.share)
        self._running[step.lane] = _InProgress(step, work, load, self.now_s, self.now_s)
        self._rate()

    def _rate(self) -> None:
        """The company has changed: what is left of each step goes on at the speed that it has now."""
        for lane, each in self._running.items():
            if each.since_s < self.now_s and each.seconds > 0.0:
                each.left = max(0.0, each.left - (self.now_s - each.since_s) / each.seconds)
            each.since_s = self.now_s
            other = self._running.get(lane.other)
            each.seconds = self._device.seconds(each.load, None if other is None else other.load)

    def _all_work(self) -> StepWork:
        """What both lanes compute, as one step: for power and for the profile's range."""
        works = [each.work for each in self._running.values()]
        if len(works) == 1:
            return works[0]
        return StepWork(
            [chunk for work in works for chunk in work.prefills],
            sum(work.decodes for work in works),
            sum(work.decode_context for work in works),
            sum(work.samples for work in works),
        )

    # ---- members --------------------------------------------------------------------------------------

    def _take_in(self, plan: StepPlan) -> None:
        for seq_id in plan.ends:
            self._joining.pop(seq_id, None)
            if seq_id in self._members:
                self._stop_decoding(self._members[seq_id])
        for start in plan.starts:
            self._begin(start)

    def _work_of(self, plan: StepPlan) -> StepWork:
        if plan.chunks:
            prefills = [(chunk.count, chunk.start + chunk.count) for chunk in plan.chunks]
            return StepWork(prefills, 0, 0, sum(chunk.emits for chunk in plan.chunks))
        context, count = self._context, plan.decode_count
        for seq_id in plan.paused:
            context -= self._clock + self._members[seq_id].offset
        return StepWork((), count, context + count, count)

    def _end_prompts(self, plan: StepPlan) -> list[int]:
        """Who ended with its first token."""
        stopped = []
        for chunk in plan.chunks:
            member = self._members.get(chunk.seq_id)
            if member is None or not chunk.emits:  # it was cancelled meanwhile, or goes on
                continue
            member.times.parts.append(self.now_s)
            member.total_len += 1
            if member.total_len == member.stop_len:
                stopped.append(chunk.seq_id)
            if Lane.DECODE in self._running:
                self._joining[chunk.seq_id] = member
            else:
                self._join(chunk.seq_id, member)
        return stopped

    def _end_decodes(self, plan: StepPlan) -> list[int]:
        """Who ended by itself with this step."""
        paused = [(seq_id, self._members[seq_id]) for seq_id in plan.paused if seq_id in self._members]
        paused = [(seq_id, member) for seq_id, member in paused if member.decodes]
        for _, member in paused:
            self._stop_decoding(member)
        self._advance_decodes(self.now_s)
        joining, self._joining = self._joining, {}
        for seq_id, member in [*paused, *joining.items()]:
            self._join(seq_id, member)
        return self._stopped()

    def _advance_decodes(self, at_s: float) -> None:
        """Every member that decodes gets a token, at `at_s`."""
        self._pass(at_s)
        self._clock += 1
        self._context += self._decoding
        self._tape.append(self.now_s)

    def _decode_alone(self, running: _InProgress, steps_max: int, until_s: float) -> int:
        """As many whole steps as end before `until_s`, one of them surely, with the device to themselves."""
        count = max(1, int(min((until_s - self.now_s) / max(running.seconds, 1e-12) + 1, _LEAP_STEPS_MAX)))
        context, done = self._context + self._decoding, 0
        ends = self._cost.decode_seconds(self._decoding, context, min(count, steps_max))
        for seconds in ends:
            end_s = self.now_s + float(seconds)
            if end_s >= until_s:
                break
            self._advance_decodes(end_s)
            done += 1
        return done

    def _join(self, seq_id: int, member: _Member) -> None:
        self._decode_from(member, member.total_len - 1)
        if member.stop_len < _STOP_NEVER:
            heapq.heappush(self._stops, (member.stop_clock, seq_id))

    def _decode_from(self, member: _Member, computed_len: int) -> None:
        super()._decode_from(member, computed_len)
        self._decoding += 1

    def _stop_decoding(self, member: _Member) -> None:
        self._decoding -= member.decodes
        super()._stop_decoding(member)
