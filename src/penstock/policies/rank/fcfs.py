"""First come, first served."""

from __future__ import annotations

from penstock.policies.rank import RANK, RankKey
from penstock.policies.view import SequenceView


@RANK.register("fcfs", source="the default of vLLM and SGLang")
class Fcfs:
    """Arrival order; preempted work keeps its place.

    Reads `arrival_index`. O(1) a sequence; keys never change.
    """

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (sequence.arrival_index,)

    def version(self, now_s: float) -> int:
        return 0
