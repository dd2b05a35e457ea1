"""Passes of a fixed number of tokens: what SplitFuse and NanoFlow's dense batch have in common.

Decodes go first, one token each; prompts fill what is left, so that at most one of them is cut, and the cut
one goes on before any other. There are never more decodes than a pass has tokens: each began with one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from penstock.core.units import ceil_div
from penstock.policies.compose import Compose, Composition, Share
from penstock.policies.context import Context
from penstock.policies.view import ReplicaView, SequenceView


class FixedPasses(Compose):
    """A `Compose` whose steps hold `pass_tokens` at most, prompts and decodes. O(prefilling) a step."""

    def __init__(self, context: Context, options: Any) -> None:
        self._cut: SequenceView | None = None  # the prompt that the last pass cut

    @abstractmethod
    def pass_tokens(self, view: ReplicaView) -> int:
        """The size of a full pass, at least 1."""

    def prompt_tokens(self, view: ReplicaView) -> int:
        """Prompt tokens of the next pass."""
        return self.pass_tokens(view) - view.decoding_count

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        planned = sum(sequence.total_len - sequence.computed_len for sequence in view.prefilling)
        return max(0, self.prompt_tokens(view) - planned)

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        left = self.prompt_tokens(view)
        available = view.blocks_available
        shares: list[Share] = []
        for sequence in self._in_order(view):
            if left <= 0:
                break
            # Later passes will need blocks for all that remains of it. A prompt that started under
            # `whole-prompt` has them. What is alone goes on without: the `preempt` policy finds them.
            available -= ceil_div(sequence.total_len, view.block_tokens) - sequence.block_count
            if available < 0 and (shares or view.decoding_count):
                break
            count = min(sequence.total_len - sequence.computed_len, left)
            left -= count
            shares.append(Share(sequence, count))
        self._cut = _cut_among(shares)
        return Composition(shares)

    def left(self, sequence: SequenceView, now_s: float) -> None:
        if sequence is self._cut:
            self._cut = None

    def _in_order(self, view: ReplicaView) -> list[SequenceView]:
        """Rank order, the continuation first."""
        cut, ranked = self._cut, view.prefilling
        if cut is None or not ranked or ranked[0] is cut:
            return list(ranked)
        return [cut, *(sequence for sequence in ranked if sequence is not cut)]


def _cut_among(shares: list[Share]) -> SequenceView | None:
    if not shares:
        return None
    last = shares[-1]
    is_whole = last.count == last.sequence.total_len - last.sequence.computed_len
    return None if is_whole else last.sequence
