"""Iteration-level scheduling: whole prompts join the running decodes in one pass."""

from __future__ import annotations

from penstock.policies.compose import COMPOSE, Composition
from penstock.policies.compose.whole_prompts import WholePrompts
from penstock.policies.view import ReplicaView


@COMPOSE.register("selective-batching", source="Orca (OSDI 2022), sections 3.1 and 3.2")
class SelectiveBatching(WholePrompts):
    """Nobody waits for a batch to end: requests join and leave between any two passes.

    A pass holds every decode and the whole prompts of whoever has just joined; nothing is cut, so one long
    prompt stretches the gap of everybody in its pass. Orca bounds a batch by requests only
    (`replica.running_max`); here prompts join while their sum is within `step_tokens_max`, or a single
    longer one. O(prefilling) a step.
    """

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        return Composition(self.shares(view))
