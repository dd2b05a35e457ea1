"""How the CPU's linears find out from how many rows on a kernel's results do not depend on their number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.linear_cpu import CpuLinearBackend, measure_rows_min, padded_rows
from penstock.engine.threads import Threads

OUT, COLUMNS = 576, 96
WEIGHT = torch.randn(OUT, COLUMNS, generator=torch.Generator().manual_seed(1))


def exact(x: Tensor) -> Tensor:
    """Row by row: the same whatever the call."""
    return torch.cat([F.linear(x[row : row + 1], WEIGHT) for row in range(len(x))])


def differing(rows_max: int) -> Callable[[Tensor], Tensor]:
    """A kernel whose calls of up to `rows_max` rows give another last bit for about one result in 8,000."""

    def multiply(x: Tensor) -> Tensor:
        result = exact(x)
        if len(x) > rows_max:
            return result
        odd = (result * 1e4).frac().abs() < 1 / 8000
        return torch.where(odd, torch.nextafter(result, torch.tensor(torch.inf)), result)

    return multiply


@pytest.mark.parametrize(
    ("rows_max", "rows_min"), [(0, 1), (1, 2), (2, 4), (3, 4), (9, 16), (31, 32), (64, None)]
)
def test_a_rare_difference_is_found(rows_max: int, rows_min: int | None) -> None:
    assert measure_rows_min(differing(rows_max), COLUMNS, torch.float32, Threads(1)) == rows_min


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(576, 1536), (960, 576)], ids=str)
def test_a_packed_matrix_gives_each_row_the_same_whatever_the_call(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """The shapes of the embedded model; 1,536 columns are where one row is summed in another order."""
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(shape, generator=generator) / 20).to(dtype)
    linear = CpuLinearBackend(Threads(1)).pack(weight, None)
    x = torch.randn(200, shape[1], generator=generator).to(dtype)
    whole = linear(x)
    for rows in (1, 2, 3, 5, 40):
        parts = [linear(part) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), whole)


def test_calls_have_few_sizes() -> None:
    """Each size costs a kernel; padding costs at most an eighth more rows."""
    sizes = {padded_rows(rows) for rows in range(1, 1025)}
    assert len(sizes) == 16 + 8 * 6
    assert all(rows <= padded_rows(rows) <= max(rows, rows * 9 / 8) for rows in range(1, 1025))
    assert all(padded_rows(size) == size for size in sizes)
