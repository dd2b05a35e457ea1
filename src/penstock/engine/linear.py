"""y = x·Wᵀ + b behind a seam: how a weight matrix is kept, and which kernel multiplies with it.

A backend packs each matrix once, at load; the model then only calls what it got. The law of batch invariance
rests here: a row of the result must not depend on which other rows are in the call, and it is the backend
that knows whether its kernels keep that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.models.ggml_quants import GgmlType


class PackedLinear(Protocol):
    """One matrix, ready to multiply with."""

    @property
    def weight_bytes(self) -> int:
        """Memory that the packed form holds."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] → [rows, out], a new tensor in x's dtype that the caller may overwrite."""
        ...


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """A matrix as it stands in a GGUF file: `data` is uint8[out, bytes per row] in the file's row order."""

    data: Tensor
    ggml_type: GgmlType
    columns: int


class LinearBackend(Protocol):
    """Packs matrices. Stateless between calls, apart from what it measured at construction."""

    @property
    def name(self) -> str: ...

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """weight: [out, in] in the model's dtype and on its device; bias: [out]. May keep the tensors."""
        ...


@runtime_checkable
class QuantisedLinearBackend(Protocol):
    """A further power of some backends: to repack a quantised matrix without a second rounding."""

    def pack_quantised(self, weight: QuantisedRows, bias: Tensor | None) -> PackedLinear | None:
        """None for a type that the backend does not take; it is then dequantised and given to `pack`."""
        ...


class PlainLinear:
    """torch's own GEMM on the weight as it is; packing makes no copy.

    Not batch-invariant by itself: BLAS may choose another blocking, and so another rounding, for another
    number of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def holds(self, weight: Tensor) -> bool:
        """Whether this linear's matrix is that very tensor, so that its memory counts once."""
        return self._weight.data_ptr() == weight.data_ptr()


class PlainLinearBackend:
    """The reference: every device and every float dtype."""

    name = "plain"

    def pack(self, weight: Tensor, bias: Tensor | None) -> PlainLinear:
        return PlainLinear(weight, bias)


def fuse_rows(parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stack matrices (or biases) that multiply the same input. A single one is cast, and copied only then."""
    if len(parts) == 1:
        return parts[0].to(device, dtype)
    rows = sum(part.shape[0] for part in parts)
    fused = torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=device)
    start = 0
    for part in parts:
        fused[start : start + part.shape[0]].copy_(part)
        start += part.shape[0]
    return fused
