"""Iteration-level scheduling: whole prompts join the running decodes in one pass."""

from __future__ import annotations

from penstock.policies.compose import COMPOSE, Compose, Composition, Share
from penstock.policies.view import ReplicaView


@COMPOSE.register("selective-batching", source="Orca (OSDI 2022), sections 3.1 and 3.2")
class SelectiveBatching(Compose):
    """Nobody waits for a batch to end: requests join and leave between any two passes.

    A pass holds every decode and the whole prompts of whoever has just joined; nothing is cut, so one long
    prompt stretches the gap of everybody in its pass. Orca bounds a batch by requests only
    (`replica.running_max`); here prompts join while their sum is within `step_tokens_max`, or a single
    longer one. O(prefilling) a step.
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
        return Composition(shares)
