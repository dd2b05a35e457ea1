"""Shortest prompt first, with ageing: whoever waits gains on those that come later."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import SequenceView


@dataclass(frozen=True, slots=True)
class AgedOptions:
    ageing_tokens_per_s: float = setting(
        200.0, "prompt tokens that a second of waiting makes up for; 0: longest may starve", low=0.0, high=1e6
    )


@RANK.register(
    "shortest-prompt-aged", source="prefill queue of Nexus (arXiv 2507.06608): SPF; the ageing is ours"
)
class ShortestPromptAged(Rank):
    """Shortest prompt first; waiting counts, so that no prompt waits for ever.

    The published order is by prompt length − γ · waiting time. Everybody's second counts alike, so the order
    of two never changes and `prompt_len + γ · submitted_s` says the same without sorting again. A request
    is overtaken only by those that come less than (its length − theirs) / γ seconds later. Preempted work
    keeps its place, where the paper speaks of remaining tokens. O(1) a sequence.
    """

    Options = AgedOptions

    def __init__(self, context: Context, options: AgedOptions) -> None:
        self._ageing = options.ageing_tokens_per_s

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (sequence.request.prompt_len + self._ageing * sequence.submitted_s,)
