"""NanoFlow's dense batch: the same number of tokens every iteration."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.settings import setting
from penstock.policies.compose import COMPOSE
from penstock.policies.compose.passes import FixedPasses
from penstock.policies.context import Context
from penstock.policies.view import ReplicaView


@dataclass(frozen=True, slots=True)
class DenseFixedOptions:
    batch_tokens: int = setting(
        2048, "tokens of every iteration, at most `replica.step_tokens`", low=1, high=1 << 20
    )


@COMPOSE.register("dense-fixed", source="NanoFlow (OSDI 2025, arXiv 2408.12757), pipeline/utils/scheduler.py")
class DenseFixed(FixedPasses):
    """Keep the matrix products at the one size that a pipeline of nano-batches was searched for.

    All decodes first, then prompt tokens cut to fill exactly; one prompt at most is cut. The batch is full
    whenever enough work waits, so throughput is best and no gap is shorter than a full batch. New requests
    start only where the KV of their future fits, which is the `admit` policy's part.
    """

    Options = DenseFixedOptions

    def __init__(self, context: Context, options: DenseFixedOptions) -> None:
        super().__init__(context, options)
        self._batch_tokens = options.batch_tokens

    def pass_tokens(self, view: ReplicaView) -> int:
        return min(view.step_tokens_max, self._batch_tokens)
