"""Prompts first, whole; decodes wait."""

from __future__ import annotations

from penstock.policies.compose import COMPOSE, Composition
from penstock.policies.compose.whole_prompts import WholePrompts
from penstock.policies.view import ReplicaView


@COMPOSE.register(
    "prefill-first", source="vLLM 0.2 scheduler, the prompt-first baseline of Sarathi-Serve (OSDI 2024)"
)
class PrefillFirst(WholePrompts):
    """Best TTFT, worst gaps: a step holds whole prompts while there are any, else all decodes.

    Prompts join while their sum stays within `step_tokens_max`; a single longer prompt runs alone, unchunked.
    O(prefilling) a step.
    """

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        shares = self.shares(view)
        return Composition(shares, decode=not shares)
