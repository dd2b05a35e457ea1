"""Admit as long as the next blocks fit."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.reasons import WaitReason
from penstock.core.settings import setting
from penstock.policies.admit import ADMIT, Admission, Admit
from penstock.policies.context import Context
from penstock.policies.view import Candidate, ReplicaView


@dataclass(frozen=True, slots=True)
class AggressiveOptions:
    watermark_frac: float = setting(
        0.01, "blocks that a start leaves free while others run, as a share of all", low=0.0, high=0.5
    )


@ADMIT.register("aggressive", source="vLLM v1 scheduler; `aggressive` of the past-future paper (ASPLOS 2025)")
class Aggressive(Admit):
    """Start when the first chunk of the prompt fits, above a small watermark; fill the memory to 99 %.

    Later chunks and all output take their blocks as they come, so a full pool preempts: best while outputs
    are short, and under load work is done twice. Reads `blocks_available`, `step_tokens_max`. O(1).
    """

    Options = AggressiveOptions

    def __init__(self, context: Context, options: AggressiveOptions) -> None:
        self._watermark_frac = options.watermark_frac

    def decide(self, candidate: Candidate, view: ReplicaView, now_s: float) -> Admission:
        first_len = min(candidate.sequence.total_len, candidate.cached_len + view.step_tokens_max)
        needed = candidate.blocks_for(first_len, view.block_tokens)
        watermark = int(self._watermark_frac * view.block_count) if view.running_count else 0
        if needed > view.blocks_available - watermark:
            return Admission(reason=WaitReason.KV_CAPACITY)
        return Admission(reserve_len=first_len)
