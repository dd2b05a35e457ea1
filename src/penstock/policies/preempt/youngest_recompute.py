"""The lowest-ranked running sequence yields and is recomputed."""

from __future__ import annotations

from penstock.policies.preempt import PREEMPT, Preempt
from penstock.policies.view import ReplicaView, SequenceView


@PREEMPT.register("youngest-recompute", source="vLLM v1 scheduler (recompute mode)")
class YoungestRecompute(Preempt):
    """The last of the running in rank order yields, perhaps the needy itself.

    Nobody is preempted for a lower-ranked sequence, and the best-ranked always advances, so there is no
    ping-pong between equals. O(1).
    """

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        return view.running[-1]
