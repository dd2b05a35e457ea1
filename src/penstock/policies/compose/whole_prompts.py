"""Steps of whole prompts: what vLLM's first scheduler and Orca have in common."""

from __future__ import annotations

from penstock.policies.compose import Compose, Share
from penstock.policies.view import ReplicaView


class WholePrompts(Compose):
    """A `Compose` that cuts no prompt: they join while their sum is within `step_tokens_max`, or a single
    longer one. O(prefilling) a step.
    """

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        planned = sum(sequence.total_len - sequence.computed_len for sequence in view.prefilling)
        return max(0, view.step_tokens_max - planned)

    def shares(self, view: ReplicaView) -> list[Share]:
        """The next step's prompts, in rank order."""
        shares: list[Share] = []
        planned = 0
        for sequence in view.prefilling:
            count = sequence.total_len - sequence.computed_len
            if shares and planned + count > view.step_tokens_max:
                break
            shares.append(Share(sequence, count))
            planned += count
        return shares
