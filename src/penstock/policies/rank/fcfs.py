"""First come, first served."""

from __future__ import annotations

from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import SequenceView


@RANK.register("fcfs", source="the default of vLLM and SGLang")
class Fcfs(Rank):
    """Arrival order; preempted work keeps its place.

    Reads `arrival_index`. O(1) a sequence; keys never change.
    """

    reorders = False

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (sequence.arrival_index,)

    def outranks(self, head: SequenceView, other: SequenceView, now_s: float) -> bool:
        return False  # all are equals; who came first waits no less for that
