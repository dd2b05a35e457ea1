"""Admit only what can run to its maximum output beside all that run."""

from __future__ import annotations

from penstock.core.reasons import WaitReason
from penstock.core.units import ceil_div
from penstock.policies.admit import ADMIT, Admission, Admit
from penstock.policies.context import Context
from penstock.policies.view import Candidate, ReplicaView, SequenceView


@ADMIT.register(
    "conservative", source="TGI, DeepSpeed-FastGen; `conservative` of the past-future paper (2025)"
)
class Conservative(Admit):
    """Promise every request the KV of its longest output, so that nobody is ever preempted for want of it.

    The promise stands in the books only: blocks are taken as tokens come, and until then unused ones may
    hold prefixes. Most outputs are far shorter than their maximum, so memory idles and the queue grows.

    Unpromised blocks = available - what the running may still take. Starting and ending change it, taking a
    promised block does not: O(1) a decision, O(running) after somebody has left.
    """

    def __init__(self, context: Context, options: object) -> None:
        self._unpromised: int | None = None  # blocks; None: count again
        self._admitted: tuple[int, int] | None = None  # who is about to start, and what it takes of these

    def started(self, sequence: SequenceView, now_s: float) -> None:
        admitted, self._admitted = self._admitted, None
        if self._unpromised is not None and admitted is not None and admitted[0] == sequence.arrival_index:
            self._unpromised -= admitted[1]
        else:
            self._unpromised = None

    def left(self, sequence: SequenceView, now_s: float) -> None:
        self._unpromised = None

    def decide(self, candidate: Candidate, view: ReplicaView, now_s: float) -> Admission:
        sequence, block_tokens = candidate.sequence, view.block_tokens
        if self._unpromised is None or self._admitted is not None or not view.running_count:
            self._admitted = None  # it did not start at once: its KV comes from the host
            promised = sum(
                ceil_div(each.request.total_len_max, block_tokens) - each.block_count for each in view.running
            )
            self._unpromised = view.blocks_available - promised
        needed = candidate.blocks_for(sequence.total_len, block_tokens)
        asked = candidate.blocks_for(sequence.request.total_len_max, block_tokens)
        fits = asked <= self._unpromised or not view.running_count
        if not fits or needed > view.blocks_available:
            return Admission(reason=WaitReason.KV_CAPACITY)
        self._admitted = sequence.arrival_index, asked
        return Admission(reserve_len=sequence.total_len)
