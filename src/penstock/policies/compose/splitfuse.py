"""Dynamic SplitFuse: long prompts are split and short ones fused, so that every pass has the same size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.core.errors import ConfigError
from penstock.core.settings import setting
from penstock.core.units import ceil_div
from penstock.policies.compose import COMPOSE
from penstock.policies.compose.passes import FixedPasses
from penstock.policies.context import Context
from penstock.policies.view import ReplicaView

PASSES_LOOKED_AT: Final = 8  # beyond so many passes of waiting prompts, even pieces are full pieces


@dataclass(frozen=True, slots=True)
class SplitFuseOptions:
    budget_rule: str = setting(
        "fixed",
        "size of a pass: `fixed` is `replica.step_tokens`, `knee` is `knee_tokens`, `even` spreads the "
        "waiting prompts evenly over as few passes",
        choices=("fixed", "knee", "even"),
    )
    knee_tokens: int = setting(
        0,
        "tokens at which throughput stops rising, as `penstock calibrate` tells; 0: not known",
        low=0,
        high=1 << 20,
    )

    def __post_init__(self) -> None:
        if self.budget_rule == "knee" and not self.knee_tokens:
            raise ConfigError(
                "`budget_rule = knee` needs `policies.options.splitfuse.knee_tokens`.",
                hint="`penstock calibrate` tells the knee of this machine's engine.",
                param="policies.options.splitfuse.knee_tokens",
            )


@COMPOSE.register(
    "splitfuse", source="DeepSpeed-FastGen (2024), DeepSpeed-MII mii/batching/ragged_batching.py"
)
class SplitFuse(FixedPasses):
    """Every pass the same number of tokens: decodes first, then prompts until it is exactly full.

    A pass takes as long as its tokens say, so equal passes give even gaps, and full ones give throughput. At
    most one prompt is cut a pass, and goes on first. `even` (the blog's argument of a concave curve, made a
    rule): P prompt tokens that need F passes take ceil(P / F) in each, not full, full and a rest.

    Unlike the original it does not rebuild its budget from ragged queries of the engine: KV of a whole prompt
    is the `admit` policy's (`whole-prompt`), and out of memory the `preempt` policy's (`flush-newest`).
    """

    Options = SplitFuseOptions

    def __init__(self, context: Context, options: SplitFuseOptions) -> None:
        super().__init__(context, options)
        self._knee_tokens = options.knee_tokens
        self._is_even = options.budget_rule == "even"

    def pass_tokens(self, view: ReplicaView) -> int:
        return min(view.step_tokens_max, self._knee_tokens or view.step_tokens_max)

    def prompt_tokens(self, view: ReplicaView) -> int:
        room = super().prompt_tokens(view)
        return self._even_share(view, room) if self._is_even and room > 0 else room

    def _even_share(self, view: ReplicaView, room: int) -> int:
        """ceil(P / F) of the F = ceil(P / room) passes that P pending prompt tokens need. O(prompts seen)."""
        pending = sum(sequence.total_len - sequence.computed_len for sequence in view.prefilling)
        for sequence in view.waiting:
            if pending >= PASSES_LOOKED_AT * room:
                return room
            pending += sequence.total_len
        return ceil_div(pending, ceil_div(pending, room)) if pending else room
