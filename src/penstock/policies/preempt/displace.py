"""Who yields, where nothing but rank counts; and that whoever came back gets on before it yields again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from penstock.core.reasons import WaitReason
from penstock.policies.preempt import Preempt
from penstock.policies.view import Refusal, ReplicaView, SequenceView

# Two steps at once would need two orders of copies.
NO_LANES: Final = dict.fromkeys(("static", "semi-pd", "nexus"), "copies of KV run beside one step, not two")


class Displacing(Preempt):
    """The last in rank yields, to running and waiting ones alike, if it had a token since it last started.

    Without that rule priorities that change faster than copies are made would stop everybody for ever. A
    sequence stops being spared with the end of a prompt, and then the replica plans afresh, so the answers
    stand for as long as ranks do. O(running) a victim.
    """

    def __init__(self) -> None:
        self._started: dict[int, int] = {}  # arrival index → output when it last started, of the running

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        for sequence in reversed(view.running):
            if sequence is needy:
                break  # it does not yield to those behind it
            if not self._is_spared(sequence):
                return sequence
        return view.running[-1]

    def make_room(self, refusal: Refusal, view: ReplicaView, now_s: float) -> SequenceView | None:
        """Nobody if for KV they all would not be enough."""
        candidate = refusal.candidate
        outranked = list(self._outranked(candidate.sequence, view))
        if not outranked:
            return None
        if refusal.reason is not WaitReason.KV_CAPACITY or len(outranked) == view.running_count:
            return outranked[0]
        needed = candidate.blocks_for(candidate.sequence.total_len, view.block_tokens)
        freed = sum(sequence.block_count for sequence in outranked)
        return outranked[0] if view.blocks_available + freed >= needed else None

    def started(self, sequence: SequenceView, now_s: float) -> None:
        self._started[sequence.arrival_index] = sequence.output_len

    def left(self, sequence: SequenceView, now_s: float) -> None:
        del self._started[sequence.arrival_index]

    def _outranked(self, head: SequenceView, view: ReplicaView) -> Iterator[SequenceView]:
        """The last in rank first."""
        for sequence in reversed(view.running):
            if not view.outranks(head, sequence):
                return
            if not self._is_spared(sequence):
                yield sequence

    def _is_spared(self, sequence: SequenceView) -> bool:
        return sequence.output_len == self._started[sequence.arrival_index]
