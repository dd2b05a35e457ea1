"""Linears of the CPU engine: packed once for oneDNN, and the same row by row whatever the batch.

A GEMM library may block, and so round, differently for another number of rows: with MKL in float32, fewer
than about ten rows differ in the last bit from many. Output must not depend on the batch (DESIGN law 8), so
each distinct shape is measured at load: from how many rows on are all results equal, bit for bit? Smaller
calls are padded to that number.

In bfloat16 another order of summing shows rarely: oneDNN multiplies a single row with 1,536 columns in other
blocks than two rows, and one result in 8,000 rounds to another number. A measurement of one call would miss
it, so as many results are compared as would show one in 10,000 almost surely.

oneDNN also makes a kernel for every row count it meets: a third of a millisecond and half a megabyte each, of
which it keeps a thousand. Steps have any number of rows, so calls are padded to one of few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.units import ceil_div
from penstock.engine.linear import PackedLinear
from penstock.engine.threads import Threads

_ROWS_TRIED: Final = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 18, 24, 30, 32, 36, 48, 64, 72, 104, 128, 144, 192)
_ROWS_MIN_TRIED: Final = (1, 2, 4, 8, 16, 32)
_RESULTS_COMPARED: Final = 100_000  # of each row count, as far as there are rows
_TILE_ROWS: Final = 32  # where no padding helps, every call is made of tiles of just so many rows


def padded_rows(rows: int) -> int:
    """The next of the row counts that calls have: all up to 16, then eight for each power of two."""
    step = 1 << max(0, rows.bit_length() - 4)
    return ceil_div(rows, step) * step


class CpuLinear:
    """One matrix behind one kernel, padded or tiled as its shape was found to need."""

    def __init__(self, multiply: Callable[[Tensor], Tensor], weight_bytes: int, rows_min: int | None) -> None:
        self._multiply = multiply
        self._weight_bytes = weight_bytes
        self._rows_min = rows_min

    @property
    def weight_bytes(self) -> int:
        return self._weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self._rows_min is None:
            padded = F.pad(x, (0, 0, 0, -rows % _TILE_ROWS))
            return torch.cat([self._multiply(tile) for tile in torch.split(padded, _TILE_ROWS)])[:rows]
        wanted = max(padded_rows(rows), self._rows_min)
        if rows < wanted:
            return self._multiply(F.pad(x, (0, 0, 0, wanted - rows)))[:rows]
        return self._multiply(x)


class CpuLinearBackend:
    """Batch-invariant linears for bfloat16 and float32 on the CPU."""

    name = "cpu"

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._rows_min: dict[tuple[torch.dtype, int, int], int | None] = {}

    @property
    def needs_padding(self) -> bool:
        """Whether any packed shape has to be padded or tiled here."""
        return any(rows_min != 1 for rows_min in self._rows_min.values())

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """weight: [out, in]. The packed copy replaces it: the caller drops the original."""
        multiply = _multiplier(weight, bias)
        shape = (weight.dtype, weight.shape[0], weight.shape[1])
        if shape not in self._rows_min:
            self._rows_min[shape] = measure_rows_min(multiply, weight.shape[1], weight.dtype, self._threads)
        weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        return CpuLinear(multiply, weight_bytes, self._rows_min[shape])


def _multiplier(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """oneDNN on a prepacked bfloat16 weight (twice as fast as plain up to 8 rows), else torch's choice."""
    ops = torch.ops.mkldnn
    packable = hasattr(ops, "_linear_pointwise") and torch._C._has_mkldnn
    if weight.dtype != torch.bfloat16 or not packable:
        return lambda x: F.linear(x, weight, bias)
    packed = ops._reorder_linear_weight(weight, None)
    return lambda x: ops._linear_pointwise(x, packed, bias, "none", [], "")


@torch.inference_mode()
def measure_rows_min(
    multiply: Callable[[Tensor], Tensor], columns: int, dtype: torch.dtype, threads: Threads
) -> int | None:
    """The least row count from which results do not depend on it; None if there is none among those tried.

    Each call is made on every number of threads that a step of so many rows may have, so that these are
    compared as well.
    """

    def run(x: Tensor, count: int) -> Tensor:
        threads.use(count)
        return multiply(x)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_ROWS_TRIED), columns, generator=generator).to(dtype)
    whole = run(x, threads.most)

    def is_equal(rows: int) -> bool:
        """Whether calls of `rows` rows give what one call of all does."""
        calls = min(len(x) // rows, ceil_div(_RESULTS_COMPARED, rows * whole.shape[1]))
        starts = range(0, calls * rows, rows)
        return all(
            torch.equal(run(x[at : at + rows], count), whole[at : at + rows])
            for count in threads.counts_for(rows)
            for at in starts
        )

    unequal = [rows for rows in _ROWS_TRIED if not is_equal(rows)]
    return next((rows_min for rows_min in _ROWS_MIN_TRIED if all(r < rows_min for r in unequal)), None)
