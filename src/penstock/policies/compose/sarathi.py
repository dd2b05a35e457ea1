"""Stall-free batching: decodes first, prompts in chunks of what is left."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.settings import setting
from penstock.core.units import ceil_div
from penstock.policies.compose import COMPOSE, Compose, Composition, Share, pieces
from penstock.policies.context import Context
from penstock.policies.view import ReplicaView, SequenceView

SIZE_MULTIPLE = 32  # tokens; dynamic sizes are multiples of it, as published


@dataclass(frozen=True, slots=True)
class SarathiOptions:
    tile_tokens: int = setting(
        1,
        "round the budget down to a multiple: the tile of the matrix products, 128 on GPUs",
        low=1,
        high=4096,
    )
    stages: int = setting(
        1, "sizes of chunks, the largest for the beginning of a prompt; 1: all chunks alike", low=1, high=64
    )
    low_tokens: int = setting(
        0, "budget of the last stage; 0 takes half of `replica.step_tokens`", low=0, high=1 << 20
    )
    span_tokens: int = setting(
        8192,
        "prompt length that the stages share evenly; what is longer stays in the last",
        low=1,
        high=1 << 24,
    )


@COMPOSE.register("sarathi", source="Sarathi-Serve (OSDI 2024), sarathi/core/scheduler/sarathi_scheduler.py")
class Sarathi(Compose):
    """Bound every gap between tokens: each decode gets one token a step, prompts share what is left.

    The budget is `step_tokens_max`; with B decodes prompts get max(0, budget - B) tokens, in rank order.
    Unfinished prompts come before new ones because they rank among the running. O(prefilling) a step.

    With `stages` (the published dynamic chunks) the budget a prompt may fill up shrinks as more of it is
    computed, since attention over a longer prefix costs more: early chunks are large, late ones small. The
    published code stops with an assertion on prompts beyond the last stage; here they stay in it.
    """

    Options = SarathiOptions

    def __init__(self, context: Context, options: SarathiOptions) -> None:
        self._options = options
        self._sizes: tuple[int, ...] = ()  # of the stages, for the budget below
        self._sizes_budget = -1

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        left = self._budget(view) - view.decoding_count
        if self._options.stages > 1:
            return max(0, left - sum(share.count for share in self._shares(view)))
        for sequence in view.prefilling:
            if left <= 0:
                break
            left -= sequence.total_len - sequence.computed_len
        return max(0, left)

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        return Composition(self._shares(view))

    def _shares(self, view: ReplicaView) -> list[Share]:
        budget, used = self._budget(view), view.decoding_count
        if self._options.stages == 1:
            return pieces(view.prefilling, budget - used)
        shares = []
        for sequence in view.prefilling:
            left = self._budget_of(sequence) - used
            if left <= 0:
                if used >= budget:
                    break
                continue
            count = min(sequence.total_len - sequence.computed_len, left)
            used += count
            shares.append(Share(sequence, count))
        return shares

    def _budget(self, view: ReplicaView) -> int:
        """The pass may be filled so far, at most: with stages, by prompts in the first."""
        tile, most = self._options.tile_tokens, view.step_tokens_max
        budget = most if tile == 1 else most // tile * tile or most
        if self._options.stages == 1:
            return budget
        if self._sizes_budget != budget:
            self._sizes, self._sizes_budget = chunk_sizes(budget, self._options), budget
        return self._sizes[0]

    def _budget_of(self, sequence: SequenceView) -> int:
        """The pass may be filled so far with chunks of this prompt, as of the last `_budget`."""
        options = self._options
        stage = sequence.computed_len // ceil_div(options.span_tokens, options.stages)
        return self._sizes[min(stage, options.stages - 1)]


def chunk_sizes(budget: int, options: SarathiOptions) -> tuple[int, ...]:
    """Evenly spaced from `budget` down to `low_tokens`, rounded to multiples of 32 (of the low size if less).

    Rounding never takes a size beyond the budget, nor to 0.
    """
    low = min(options.low_tokens or max(1, budget // 2), budget)
    multiple = min(SIZE_MULTIPLE, low)
    step = (budget - low) / (options.stages - 1)
    spaced = (budget - step * stage for stage in range(options.stages))
    return tuple(min(budget, max(multiple, round(size / multiple) * multiple)) for size in spaced)
