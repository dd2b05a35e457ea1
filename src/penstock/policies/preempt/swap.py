"""The lowest-ranked running sequence yields, and its KV is copied to the host, block by block."""

from __future__ import annotations

from penstock.policies.base import NoOptions
from penstock.policies.context import Context
from penstock.policies.preempt import PREEMPT, CopySize, Manner
from penstock.policies.preempt.displace import NO_LANES, Displacing
from penstock.policies.view import ReplicaView, SequenceView


@PREEMPT.register("swap", source="vLLM 0.3, `preemption_mode=swap`; the baseline of FastSwitch")
class Swap(Displacing):
    """The last of the running yields; its KV is copied out and later back, while every step waits.

    Each block is a copy of its own, and the host's copy is dropped when it was copied back. The head of the
    queue takes the place of whom it outranks. Without `replica.host_kv_memory`, or where that is full, the
    victim is computed again. Reads `running`, `blocks_available`. O(victims).
    """

    conflicts = NO_LANES
    swaps = True
    copies_runs = False

    def __init__(self, context: Context, options: NoOptions) -> None:
        super().__init__()

    def swap_out(self, victim: SequenceView, size: CopySize, view: ReplicaView, now_s: float) -> Manner:
        return Manner.SWAP
