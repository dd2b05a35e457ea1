"""The knee of an engine: from how many tokens a step on its throughput hardly rises any more."""

from __future__ import annotations

from typing import Final

from penstock.twin.costs.model import CostModel
from penstock.twin.costs.work import StepWork

# Tokens of a step
SIZES: Final = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
KNEE_FRAC: Final = 0.9  # of the best throughput among them


def knee_tokens(cost: CostModel, rows_max: int = SIZES[-1]) -> int:
    """Tokens of the smallest step that reaches nine tenths of the best throughput; a size of `SIZES`.

    Steps are one chunk each without tokens before it, up to `rows_max` tokens: the sizes that the model was
    measured at. Past the knee a step only grows longer (DeepSpeed-FastGen, 2024).
    """
    sizes = [size for size in SIZES if size <= rows_max] or [SIZES[0]]
    rates = [size / cost.seconds(StepWork([(size, size)], 0, 0, 1)) for size in sizes]
    return next(size for size, rate in zip(sizes, rates, strict=True) if rate >= KNEE_FRAC * max(rates))
