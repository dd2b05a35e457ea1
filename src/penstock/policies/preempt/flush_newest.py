"""Decodes that lack a block wait; only when nothing can move is the newest holder flushed."""

from __future__ import annotations

from penstock.policies.preempt import PREEMPT, Preempt
from penstock.policies.view import ReplicaView, SequenceView


@PREEMPT.register(
    "flush-newest", source="DeepSpeed-FastGen (2024), DeepSpeed-MII mii/batching/ragged_batching.py"
)
class FlushNewest(Preempt):
    """Evict late: a decode without a block sits out while others go on, since one of them may end.

    Fewer tokens are computed twice than under `youngest-recompute`, and the gaps of those that sit out grow.
    When nobody can move, the last in rank is flushed, and computed again from prompt and output. The original
    puts it at the back of its line; here its rank says when it comes back.
    """

    def sits_out(self, needy: SequenceView, view: ReplicaView, now_s: float) -> bool:
        return True

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        return view.running[-1]
