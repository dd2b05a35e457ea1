"""The executor of the twin: charges the modelled time of a plan instead of computing it.

It knows what the engine would know: who decodes, and how long each context is. Like the replica's lane it
moves all decoding sequences by one addition, so that a stretch of decode steps costs what its times cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, overload

from penstock.core.step import CopyDone, SequenceStart, StepPlan, StepResult
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.work import StepWork
from penstock.twin.host_link import HostLink

_FOREVER: Final = float("inf")
_POWER_PLANS: Final = 32  # power is looked up once in so many plans, and held in between
_LEAP_STEPS_MAX: Final = 1024  # times are computed at most so many steps ahead


class TokenTimes:
    """When one request's tokens came; a window on the tape of decode steps that all requests share.

    `parts` holds instants (floats) and stretches of the tape ((from, to) pairs), in order.
    """

    __slots__ = ("_tape", "parts")

    def __init__(self, tape: list[float]) -> None:
        self._tape = tape
        self.parts: list[float | tuple[int, int]] = []

    @property
    def first_s(self) -> float | None:
        return self._edge(0)

    @property
    def last_s(self) -> float | None:
        return self._edge(-1)

    def all_s(self) -> list[float]:
        """Every token's instant, in order."""
        times: list[float] = []
        for part in self.parts:
            times += self._tape[part[0] : part[1]] if isinstance(part, tuple) else [part]
        return times

    def _edge(self, end: int) -> float | None:
        if not self.parts:
            return None
        part = self.parts[end]
        return self._tape[part[0] if end == 0 else part[1] - 1] if isinstance(part, tuple) else part


class Gaps(Sequence[float]):
    """Gaps between consecutive tokens, computed when somebody reads them: most runs never read most."""

    __slots__ = ("_times",)

    def __init__(self, times: TokenTimes) -> None:
        self._times = times

    def __len__(self) -> int:
        parts = self._times.parts
        return sum(part[1] - part[0] if isinstance(part, tuple) else 1 for part in parts) - 1 if parts else 0

    def __iter__(self) -> Iterator[float]:
        times = self._times.all_s()
        return (later - earlier for earlier, later in pairwise(times))

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> list[float]: ...
    def __getitem__(self, index: int | slice) -> float | list[float]:
        return list(self)[index]


class _Member:
    """A request the executor knows, from its first start until it has finished."""

    __slots__ = ("decodes", "joined", "offset", "seq_id", "stop_clock", "stop_len", "times", "total_len")

    def __init__(self, seq_id: int, times: TokenTimes, stop_len: int) -> None:
        self.seq_id = seq_id
        self.times = times
        self.stop_len = stop_len  # total length at which it ends by itself
        self.total_len = 0  # known tokens when it was last started
        self.decodes = False
        self.offset = 0  # while it decodes, its KV holds clock + offset tokens
        self.joined = 0  # the tape's length when it began to decode
        self.stop_clock = 0


class ModelledExecutor:
    """Runs plans on a cost model, in virtual time. Deterministic.

    `output_lens` says for a request id after how many tokens its output ends by itself; whoever is not in
    it runs to its maximum. `now_s` is the virtual clock, which `execute` moves. `horizon_s` bounds a leap: it
    ends with the first step that ends at or after it, as the engine sees an arrival between two steps.
    """

    def __init__(self, cost: CostModel, output_lens: Mapping[str, int], link: HostLink | None = None) -> None:
        self._cost = cost
        self.link = link  # needed where plans have copies
        self._output_lens = output_lens
        self._members: dict[int, _Member] = {}
        self._seq_ids: dict[str, int] = {}
        self._context = 0  # tokens in the KV of all that decode
        self._clock = 0  # decode steps so far
        self._stops: list[tuple[int, int]] = []  # (clock, seq_id) of ends that are not maxima
        self._tape: list[float] = []  # the end of every decode step
        self.now_s = 0.0
        self.horizon_s = _FOREVER
        self.steps = 0
        self.steps_out_of_range = 0  # of those that were larger than every step before
        self.busy_s = 0.0
        self.busy_joules = 0.0  # 0 where the profile knows no power
        self._watts = 0.0  # as of the last look
        self._plans = 0
        self._largest = [0, 0, 0]  # rows, decodes, context

    def execute(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.ends:
            if seq_id in self._members:  # else it has finished, and was taken out
                self._stop_decoding(self._members[seq_id])
        for start in plan.starts:
            self._begin(start)
        stalled_s = 0.0 if self.link is None else self._copy(plan, self.link)
        if not plan.decode_count and not plan.chunks:
            return StepResult(None, copied=self._copied(), stalled_s=stalled_s)
        began_s = self.now_s
        if plan.chunks or plan.paused:
            steps, stopped = 1, self._mixed_step(plan)
        else:
            steps, stopped = self._decode_steps(plan), []
        self.steps += steps
        stopped += self._stopped()
        duration_s = self.now_s - began_s
        self.busy_s += duration_s
        self.busy_joules += self._watts * duration_s
        result = StepResult(None, stopped, steps, duration_s=duration_s)
        if self.link is not None:
            result.copied, result.stalled_s = self._copied(), stalled_s
        return result

    def finish(self, request_id: str) -> TokenTimes | None:
        """Forget a request that has ended, and say when its tokens came; None if it never started."""
        seq_id = self._seq_ids.pop(request_id, None)
        if seq_id is None:
            return None
        member = self._members.pop(seq_id)
        self._stop_decoding(member)
        return member.times

    def _copy(self, plan: StepPlan, link: HostLink) -> float:
        """Begin the plan's copies, and wait for those it needs. Returns how long that took."""
        began_s = self.now_s
        link.begin(plan.copies, plan.waits, began_s)
        if plan.waits:
            self.now_s = max(began_s, link.done_s(plan.waits))
        return self.now_s - began_s

    def _copied(self) -> Sequence[CopyDone]:
        return () if self.link is None else self.link.take(self.now_s)

    def _begin(self, start: SequenceStart) -> None:
        member = self._members.get(start.seq_id)
        if member is None:
            stop_len = start.prompt_len + self._output_lens.get(start.request_id, 1 << 60)
            member = _Member(start.seq_id, TokenTimes(self._tape), stop_len)
            self._members[start.seq_id] = member
            self._seq_ids[start.request_id] = start.seq_id
        member.total_len = start.total_len

    def _mixed_step(self, plan: StepPlan) -> list[int]:
        """One step with chunks, or with some decodes left out. Returns who ended with its first token."""
        paused = [self._members[seq_id] for seq_id in plan.paused]
        for member in paused:
            self._stop_decoding(member)
        prefills = [(chunk.count, chunk.start + chunk.count) for chunk in plan.chunks]
        emitting = [chunk for chunk in plan.chunks if chunk.emits]
        decodes = plan.decode_count
        work = StepWork(prefills, decodes, self._context + decodes, decodes + len(emitting))
        self._look_closely(work)
        self.now_s += self._cost.seconds(work)
        if decodes:
            self._clock += 1
            self._context += decodes
            self._tape.append(self.now_s)
        for member in paused:
            self._decode_from(member, member.total_len - 1)
        stopped = []
        for chunk in emitting:
            member = self._members[chunk.seq_id]
            member.times.parts.append(self.now_s)
            member.total_len += 1
            if member.total_len == member.stop_len:
                stopped.append(chunk.seq_id)
            self._decode_from(member, member.total_len - 1)
        return stopped

    def _decode_steps(self, plan: StepPlan) -> int:
        """As many of the plan's steps as fit before the horizon and the next end by itself."""
        decodes, limit = plan.decode_count, plan.repeat
        if self._stops:
            limit = min(limit, max(1, self._stops[0][0] - self._clock))
        self._look_closely(StepWork((), decodes, self._context + decodes * limit, decodes))
        now_s, horizon_s, tape, done, count = self.now_s, self.horizon_s, self._tape, 0, 1
        horizon_s = min(horizon_s, plan.until_s, _FOREVER if self.link is None else self.link.next_s)
        while done < limit and (now_s < horizon_s or not done):
            context = self._context + decodes * (done + 1)
            for seconds in self._cost.decode_seconds(decodes, context, count):
                last_s = float(seconds)
                now_s += last_s
                tape.append(now_s)
                done += 1
                if now_s >= horizon_s:
                    break
            # About as many more as will fit: contexts grow, so that steps become no shorter.
            fitting = (horizon_s - now_s) / last_s if last_s > 0.0 else _FOREVER
            count = max(1, min(limit - done, int(min(fitting, _LEAP_STEPS_MAX)) + 1))
        self.now_s = now_s
        self._clock += done
        self._context += decodes * done
        return done

    def _look_closely(self, work: StepWork) -> None:
        """Range and power, which the cost model is slow to say: of every so-many-th plan, and of each step
        that exceeds all before it in some way."""
        sizes = (work.rows, work.decodes, work.decode_context)
        largest = self._largest
        is_largest = sizes[0] > largest[0] or sizes[1] > largest[1] or sizes[2] > largest[2]
        self._plans += 1
        if not is_largest and self._plans % _POWER_PLANS:
            return
        cost = self._cost.step(work)
        self._watts = cost.joules / cost.seconds if cost.seconds > 0.0 else 0.0
        if is_largest:
            self._largest = [max(pair) for pair in zip(largest, sizes, strict=True)]
            self.steps_out_of_range += not cost.in_range

    def _stopped(self) -> list[int]:
        """Who reached the end of its output with the last step."""
        found = []
        while self._stops and self._stops[0][0] <= self._clock:
            clock, seq_id = heapq.heappop(self._stops)
            member = self._members.get(seq_id)
            if member is not None and member.decodes and member.stop_clock == clock:
                found.append(seq_id)
        return found

    def _decode_from(self, member: _Member, computed_len: int) -> None:
        member.decodes = True
        member.offset = computed_len - self._clock
        member.joined = len(self._tape)
        member.stop_clock = member.stop_len - 1 - member.offset
        if member.stop_len < 1 << 59:
            heapq.heappush(self._stops, (member.stop_clock, member.seq_id))
        self._context += computed_len

    def _stop_decoding(self, member: _Member) -> None:
        if not member.decodes:
            return
        member.decodes = False
        computed_len = self._clock + member.offset
        self._context -= computed_len
        member.total_len = computed_len + 1
        if len(self._tape) > member.joined:
            member.times.parts.append((member.joined, len(self._tape)))
