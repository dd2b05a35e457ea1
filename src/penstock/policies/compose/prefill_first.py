"""Prompts first, whole; decodes wait."""

from __future__ import annotations

from penstock.policies.compose import COMPOSE, Compose, Composition, Share
from penstock.policies.view import ReplicaView


@COMPOSE.register(
    "prefill-first", source="vLLM 0.2 scheduler, the prompt-first baseline of Sarathi-Serve (OSDI 2024)"
)
class PrefillFirst(Compose):
    """Best TTFT, worst gaps: a step holds whole prompts while there are any, else all decodes.

    Prompts join while their sum stays within `step_tokens_max`; a single longer prompt runs alone, unchunked.
    O(prefilling) a step.
    """

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        planned = sum(sequence.total_len - sequence.computed_len for sequence in view.prefilling)
        return max(0, view.step_tokens_max - planned)

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        shares: list[Share] = []
        planned = 0
        for sequence in view.prefilling:
            count = sequence.total_len - sequence.computed_len
            if shares and planned + count > view.step_tokens_max:
                break
            shares.append(Share(sequence, count))
            planned += count
        return Composition(shares, decode=not shares)
