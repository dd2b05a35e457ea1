"""Stall-free batching: decodes first, prompts in chunks of what is left."""

from __future__ import annotations

from penstock.policies.compose import COMPOSE, Compose, Composition, Share
from penstock.policies.view import ReplicaView


@COMPOSE.register("sarathi", source="Sarathi-Serve (OSDI 2024), sarathi/core/scheduler/sarathi_scheduler.py")
class Sarathi(Compose):
    """Bound every gap between tokens: each decode gets one token a step, prompts share what is left.

    The budget is `step_tokens_max`; with B decodes prompts get max(0, budget - B) tokens, in rank order.
    Unfinished prompts come before new ones because they rank among the running. O(prefilling) a step.
    """

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        left = view.step_tokens_max - view.decoding_count
        for sequence in view.prefilling:
            left -= sequence.total_len - sequence.computed_len
        return max(0, left)

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        left = view.step_tokens_max - view.decoding_count
        shares = []
        for sequence in view.prefilling:
            if left <= 0:
                break
            count = min(sequence.total_len - sequence.computed_len, left)
            left -= count
            shares.append(Share(sequence, count))
        return Composition(shares)
