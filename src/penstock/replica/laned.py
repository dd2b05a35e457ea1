"""A replica with two step loops over one KV pool: a prefill lane and a decode lane.

    plan_lane(PREFILL) ─► executor ─► complete_lane ─┐
                                                      ├─ one set of books, one pool, one queue
    plan_lane(DECODE)  ─► executor ─► complete_lane ─┘

Both lanes may have a step in progress at once; the host plans an idle lane, in the order of `plan_order`,
and tells when its step is over. A prompt that is computed joins the decodes where it stands: its blocks keep
their ids, and the decode lane takes it in with its next step.

What a step in progress may read or write is nobody else's: a sequence that the other lane computes yields to
nobody, and the blocks of one that is cancelled meanwhile are given back when that step is over. Memory is
the decode lane's first: while a decode waits for blocks that only the prefill lane could give, no prompt
goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from penstock.core.events import Finished, ReplicaEvent
from penstock.core.reasons import PreemptReason
from penstock.core.request import Request
from penstock.core.step import StepPlan, StepResult
from penstock.policies.compose import Compose, Composition
from penstock.policies.lanes import Batch, Lane, Shares
from penstock.policies.preempt import Preempt
from penstock.policies.stack import Stack
from penstock.policies.view import Refusal, ReplicaView, SequenceView
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica
from penstock.replica.sequence import Sequence

SWITCHES_WAITING_MAX: Final = 8
_NEVER: Final = float("inf")


@dataclass(slots=True)
class LaneStep:
    """A step of one lane, from its plan until it is completed."""

    lane: Lane
    plan: StepPlan
    share: float  # of the device, as asked for; the other lane's may overlap it
    batch: Batch
    seq_ids: frozenset[int]  # of a prefill step: whose chunks it computes


@dataclass(slots=True)
class _Lent:
    """Blocks of a sequence that has left while a step that computes it goes on."""

    lane: Lane
    blocks: list[int]
    shared_count: int
    request: Request


class LanedReplica(Replica):
    """Decides the steps of both lanes. Not for `plan` and `complete`, which know one step at a time."""

    def __init__(self, limits: ReplicaLimits, stack: Stack) -> None:
        between = _BetweenSteps(stack.preempt, self._may_yield)
        super().__init__(limits, replace(stack, compose=_PromptsAlone(stack.compose), preempt=between))
        self._lanes = stack.lanes
        self._steps: dict[Lane, LaneStep] = {}
        self._newcomers: set[int] = set()  # seq_ids that began to decode while a decode step ran
        self._lent: list[_Lent] = []
        self._decode_lacks_room = False
        self._switches = _Switches()

    @property
    def in_progress(self) -> dict[Lane, LaneStep]:
        return self._steps

    @property
    def shares(self) -> Shares | None:
        """What a lane that begins now gets; None before the first step."""
        return self._switches.current

    @property
    def switch_due_s(self) -> float:
        """When other shares become ready: a decode step that begins then needs a new plan."""
        return self._switches.due_s

    @property
    def switches_total(self) -> int:
        return self._switches.total

    @property
    def plan_order(self) -> tuple[Lane, Lane]:
        """Prompts first, so that who waits is seen by both; decodes first where they lack memory."""
        return (Lane.DECODE, Lane.PREFILL) if self._decode_lacks_room else (Lane.PREFILL, Lane.DECODE)

    def plan(self, now_s: float) -> StepPlan | None:
        raise AssertionError("a replica with lanes plans by lane")

    def plan_lane(self, lane: Lane, now_s: float) -> LaneStep | None:
        """The lane's next step, or None where it has nothing to do until something else happens."""
        assert lane not in self._steps, "complete the lane's last step first"
        self._now_s = now_s
        self._expire_pins(now_s)
        self._refresh_ranks(now_s)
        plan = self._plan_prompts(now_s) if lane is Lane.PREFILL else self._plan_decodes(now_s)
        if plan is None:
            return None
        batch, other = self._batch_of(plan), self._other_batch(lane)
        prefill, decode = (batch, other) if lane is Lane.PREFILL else (other, batch)
        wanted = self._lanes.shares(lane, prefill, decode, self, now_s)
        share = self._switches.share(lane, wanted, self._lanes.switch_s, now_s)
        step = LaneStep(lane, plan, share, batch, frozenset(c.seq_id for c in plan.chunks))
        self._steps[lane] = step
        if lane is Lane.PREFILL and Lane.DECODE in self._steps:
            self._steps[Lane.DECODE].plan.repeat = 1  # its share was for decodes alone
        return step

    def complete_lane(self, step: LaneStep, result: StepResult, now_s: float) -> list[ReplicaEvent]:
        """Account the lane's step. Events as of `complete`."""
        lane, plan = step.lane, step.plan
        assert self._steps.get(lane) is step, "a step is completed once"
        del self._steps[lane]
        if lane is Lane.DECODE:
            plan.paused |= self._newcomers  # they were not there when it began
            self._newcomers = set()
        elif Lane.DECODE in self._steps:
            self._newcomers |= {c.seq_id for c in plan.chunks if c.emits and c.seq_id in self._running}
        self._outstanding = plan
        events = self.complete(plan, result, now_s)
        self._give_back(lane, now_s)
        return events

    def fail_all(self, detail: str, now_s: float) -> list[Finished]:
        """As without lanes; the steps of both are over."""
        for lane in list(self._steps):
            del self._steps[lane]
            self._give_back(lane, now_s)
        self._newcomers = set()
        return super().fail_all(detail, now_s)

    # ---- making a plan --------------------------------------------------------------------------------

    def _plan_prompts(self, now_s: float) -> StepPlan | None:
        if self._decode_lacks_room:
            return None
        if self._waiting:
            self._admit_waiting(now_s)
        while self._prefilling:
            preempted_before = self._stats.preemptions_total
            chunks = self._chunks(self._stack.compose.compose(self, now_s), now_s)
            if chunks:
                return self._make_plan(chunks, 0, frozenset())
            if self._stats.preemptions_total == preempted_before:
                break  # else whom the step was for has yielded, and the others may have it
        return None

    def _plan_decodes(self, now_s: float) -> StepPlan | None:
        self._decode_lacks_room = False
        preempted_before = self._stats.preemptions_total
        self._secure_decodes(now_s)
        members = self._lane.members
        paused = self._sitting_out.intersection(members)
        decode_count = len(members) - len(paused)
        if not decode_count:
            return None
        plan = self._make_plan([], decode_count, frozenset(paused))
        if not paused and self._stats.preemptions_total == preempted_before:
            plan.repeat = self._steps_without_decision(now_s)
            plan.until_s = self._pins.due_s
        return plan

    def _batch_of(self, plan: StepPlan) -> Batch:
        if plan.chunks:
            return Batch(tuple((chunk.count, chunk.start + chunk.count) for chunk in plan.chunks))
        context = self._lane.context
        for seq_id in plan.paused:
            context -= self._lane.members[seq_id].computed_len
        return Batch((), plan.decode_count, context + plan.decode_count)

    def _other_batch(self, lane: Lane) -> Batch | None:
        """What the other lane computes, or the decodes that are about to begin a step."""
        step = self._steps.get(lane.other)
        if step is not None:
            return step.batch
        count = len(self._lane.members)
        if lane is Lane.DECODE or not count:
            return None
        return Batch((), count, self._lane.context + count)

    # ---- what a step in progress holds ----------------------------------------------------------------

    def _computing(self, sequence: Sequence) -> Lane | None:
        """The lane whose step in progress reads or writes its KV."""
        if sequence.lane is None:
            step = self._steps.get(Lane.PREFILL)
            return Lane.PREFILL if step is not None and sequence.seq_id in step.seq_ids else None
        step = self._steps.get(Lane.DECODE)
        if step is None or sequence.seq_id in self._newcomers or sequence.seq_id in step.plan.paused:
            return None
        return Lane.DECODE

    def _may_yield(self, sequence: SequenceView) -> bool:
        return self._computing(cast(Sequence, sequence)) is None

    def _secure(self, sequence: Sequence, length: int, now_s: float) -> bool:
        """As without lanes, but nobody gives up its own KV while the other lane may give some: it waits."""
        missing = -(-length // self.block_tokens) - len(sequence.blocks)
        while missing > self._pool.available and self._steps:
            victim = self._stack.preempt.victim(sequence, self, now_s)
            if victim is sequence:
                self._decode_lacks_room |= sequence.lane is not None
                return False
            self._preempt(cast(Sequence, victim), sequence, PreemptReason.KV_EXHAUSTED, now_s)
        return super()._secure(sequence, length, now_s)

    def _leave_running(self, sequence: Sequence, now_s: float) -> None:
        """As without lanes; but blocks that a step in progress may touch go back when it is over."""
        lane = self._computing(sequence)
        if lane is not None:
            lent = _Lent(lane, sequence.blocks, sequence.published_blocks, sequence.request)
            self._lent.append(lent)
            sequence.blocks, sequence.published_blocks = [], 0
        self._newcomers.discard(sequence.seq_id)
        super()._leave_running(sequence, now_s)

    def _give_back(self, lane: Lane, now_s: float) -> None:
        """The lane's step is over: nothing touches the blocks of those that left meanwhile."""
        for lent in [each for each in self._lent if each.lane is lane]:
            self._pool.release(lent.blocks, lent.shared_count, lent.request, now_s)
            self._lent.remove(lent)

    def _other_holders(self) -> list[list[int]]:
        return [lent.blocks for lent in self._lent]

    def check_invariants(self) -> None:
        super().check_invariants()
        assert all(lent.lane in self._steps for lent in self._lent), "blocks are lent to a step in progress"
        assert self._newcomers <= self._lane.members.keys()
        assert not self._newcomers or Lane.DECODE in self._steps


class _Switches:
    """Shares that were asked for, until they are ready; then until others are."""

    def __init__(self) -> None:
        self.current: Shares | None = None
        self.total = 0
        self._waiting: list[tuple[float, Shares]] = []

    @property
    def due_s(self) -> float:
        return self._waiting[0][0] if self._waiting else _NEVER

    def share(self, lane: Lane, wanted: Shares, switch_s: float, now_s: float) -> float:
        """The share for a step that begins now, after the lanes policy has said what it wants."""
        last = self._waiting[-1][1] if self._waiting else self.current
        if last is None:
            self.current = wanted  # the first ones were made with the server
        elif wanted != last:
            if len(self._waiting) == SWITCHES_WAITING_MAX:
                self._waiting.pop()
            self._waiting.append((now_s + switch_s, wanted))
        while self._waiting and self._waiting[0][0] <= now_s:
            self.current = self._waiting.pop(0)[1]
            self.total += 1
        assert self.current is not None
        return self.current.of(lane)


class _Narrowed:
    """A replica's view with some answers replaced."""

    def __init__(self, view: ReplicaView, **answers: Any) -> None:
        self._view = view
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        answers = self._answers
        return answers[name] if name in answers else getattr(self._view, name)


class _PromptsAlone(Compose):
    """What a composer makes of the prompts when no decode is in its step."""

    def __init__(self, inner: Compose) -> None:
        self._inner = inner

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        return self._inner.prefill_room(self._prompts_of(view), now_s)

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        return self._inner.compose(self._prompts_of(view), now_s)

    def _prompts_of(self, view: ReplicaView) -> ReplicaView:
        """The step has room for prompts alone; who runs, and the KV they hold, are there to be seen."""
        return cast(ReplicaView, _Narrowed(view, decoding_count=0, decode_context=0))


class _BetweenSteps(Preempt):
    """A preemption policy that sees only those whom no step in progress computes, and the needy."""

    def __init__(self, inner: Preempt, may_yield: Callable[[SequenceView], bool]) -> None:
        self._inner = inner
        self._may_yield = may_yield

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        return self._inner.victim(needy, self._free(view, needy), now_s)

    def sits_out(self, needy: SequenceView, view: ReplicaView, now_s: float) -> bool:
        return self._inner.sits_out(needy, self._free(view, needy), now_s)

    def make_room(self, refusal: Refusal, view: ReplicaView, now_s: float) -> SequenceView | None:
        free = self._free(view, None)
        return self._inner.make_room(refusal, free, now_s) if free.running else None

    def _free(self, view: ReplicaView, needy: SequenceView | None) -> ReplicaView:
        free = [each for each in view.running if each is needy or self._may_yield(each)]
        prompts = [each for each in free if not each.is_decoding]
        narrowed = _Narrowed(
            view,
            running=cast(SequenceOf[SequenceView], free),
            running_count=len(free),
            prefilling=prompts,
            decoding_count=len(free) - len(prompts),
        )
        return cast(ReplicaView, narrowed)
