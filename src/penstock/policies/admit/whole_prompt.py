"""Admit a request when its whole prompt fits."""

from __future__ import annotations

from penstock.core.reasons import WaitReason
from penstock.policies.admit import ADMIT, Admission, Admit
from penstock.policies.view import Candidate, ReplicaView


@ADMIT.register("whole-prompt", source="vLLM BlockSpaceManager; Sarathi-Serve (OSDI 2024), scheduler step 4")
class WholePrompt(Admit):
    """Reserve the whole prompt up front, above a watermark, so that a started prompt is never stuck half way.

    The watermark (1 % of the blocks, vLLM's default) leaves room for the running decodes to grow; it does
    not apply when nothing runs. Output to come is not counted: decodes may have to preempt. O(1).
    """

    watermark_frac = 0.01

    def decide(self, candidate: Candidate, view: ReplicaView, now_s: float) -> Admission:
        sequence = candidate.sequence
        needed = candidate.blocks_for(sequence.total_len, view.block_tokens)
        watermark = int(self.watermark_frac * view.block_count) if view.running_count else 0
        if needed > view.blocks_available - watermark:
            return Admission(reason=WaitReason.KV_CAPACITY)
        return Admission(reserve_len=sequence.total_len)
