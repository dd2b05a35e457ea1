"""A higher class takes slots and KV from a lower one, and is kept from doing harm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.core.reasons import FinishReason, WaitReason
from penstock.core.settings import setting
from penstock.policies.base import FOREVER
from penstock.policies.context import Context
from penstock.policies.preempt import PREEMPT, Preempt
from penstock.policies.view import Refusal, ReplicaView, SequenceView


@dataclass(frozen=True, slots=True)
class PriorityOptions:
    step_max: int = setting(4, "running requests that may be displaced in one step", low=1, high=4096)
    request_max: int = setting(
        8, "times that a request may be displaced by a waiting one in its life; 0: never", low=0, high=1 << 20
    )
    boost_tokens: int = setting(
        32, "output that a request may produce after it came back before it is displaced again",
        low=0, high=1 << 20,
    )  # fmt: skip


@PREEMPT.register("priority", source="vLLM v1 scheduler, policy `priority`, extended to a full running set")
class StrictClasses(Preempt):
    """The head of the queue takes the place of the last in rank that it outranks, also at the slot cap.

    Works with any rank: who outranks whom is the rank's word (`Rank.outranks`), strict between classes, never
    true of equals, and with a margin where keys drift. Bounds on the harm: `step_max` a step, `request_max` a
    request, and who came back is left alone for `boost_tokens`. For KV somebody yields only if everybody who
    may would free enough. When a running sequence needs a block, the last in rank yields, whoever has not
    just come back first, and never for somebody behind it. Yielding means computing again; the place in the
    queue is kept. O(running) for a head that cannot start.
    """

    Options = PriorityOptions

    def __init__(self, context: Context, options: PriorityOptions) -> None:
        self._options = options
        self._times: dict[int, int] = {}  # that it was displaced by a waiting one, by arrival index
        self._away: set[int] = set()  # gave way, and have not come back
        self._shields: dict[int, int] = {}  # output length up to which it is left alone
        self._step_s = -1.0
        self._step_count = 0

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        chosen = view.running[-1]
        for sequence in reversed(view.running):
            if not self._is_shielded(sequence):
                chosen = sequence
                break
            if sequence is needy:
                break  # all that rank behind it are shielded
        self._away.add(chosen.arrival_index)
        return chosen

    def make_room(self, refusal: Refusal, view: ReplicaView, now_s: float) -> SequenceView | None:
        if now_s != self._step_s:
            self._step_s, self._step_count = now_s, 0
        if self._step_count >= self._options.step_max:
            return None
        head = refusal.candidate.sequence
        eligible = (each for each in self._outranked(head, view) if not self._is_shielded(each))
        chosen = next(eligible, None)
        if chosen is None:
            return None
        if refusal.reason is WaitReason.KV_CAPACITY:
            freed = chosen.block_count + sum(each.block_count for each in eligible)
            if view.blocks_available + freed < refusal.candidate.blocks_for(
                head.total_len, view.block_tokens
            ):
                return None
        self._step_count += 1
        self._times[chosen.arrival_index] = self._times.get(chosen.arrival_index, 0) + 1
        self._away.add(chosen.arrival_index)
        return chosen

    def started(self, sequence: SequenceView, now_s: float) -> None:
        if sequence.arrival_index in self._away:
            self._away.remove(sequence.arrival_index)
            self._shields[sequence.arrival_index] = sequence.output_len + self._options.boost_tokens

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        self._away.discard(sequence.arrival_index)
        self._times.pop(sequence.arrival_index, None)
        self._shields.pop(sequence.arrival_index, None)

    def steps_valid(self, view: ReplicaView, now_s: float) -> int:
        """Until a shield of somebody whom the head outranks is used up."""
        head = next(iter(view.waiting), None)
        if head is None or not self._shields:
            return FOREVER
        shielded = [each for each in self._outranked(head, view) if each.arrival_index in self._shields]
        steps = (self._shields[each.arrival_index] - each.output_len for each in shielded)
        return min((each for each in steps if each > 0), default=FOREVER)

    def _outranked(self, head: SequenceView, view: ReplicaView) -> Iterator[SequenceView]:
        """Running sequences that may be displaced for `head`, but for shields; the last in rank first."""
        for sequence in reversed(view.running):
            if not view.outranks(head, sequence):
                return
            if self._times.get(sequence.arrival_index, 0) < self._options.request_max:
                yield sequence

    def _is_shielded(self, sequence: SequenceView) -> bool:
        return sequence.output_len < self._shields.get(sequence.arrival_index, 0)
