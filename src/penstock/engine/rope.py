"""Rotary position embedding: frequencies, and the table of cosines and sines by position.

Half-split convention, as transformers: feature i of a head turns together with feature i + head_dim/2. With
c and s the cosines and sines of a row's position, doubled to head_dim,

    rotated = x · c + roll(x, head_dim/2) · (−s for the first half, +s for the second)

which equals transformers' `x·cos + rotate_half(x)·sin` bit for bit, because negation is exact.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from penstock.models.config import RopeConfig, RopeScaling

_FIRST_POSITIONS: Final = 1024


def inverse_frequencies(config: RopeConfig, head_dim: int, factors: Tensor | None = None) -> Tensor:
    """Radians per position of each feature pair: float32[head_dim / 2], on the CPU. Pure.

    `factors`: float32[head_dim / 2] that divide the frequencies, where a checkpoint carries them.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    if factors is not None:
        plain = plain / factors.to("cpu", torch.float32)
    if config.scaling is None:
        return plain
    if config.scaling.kind == "linear":
        return plain / config.scaling.factor
    if config.scaling.kind == "llama3":
        return _llama3(plain, config.scaling)
    return _yarn(plain, config.scaling, config.theta, head_dim)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / plain
    context_len, low, high = scaling.original_context_len, scaling.low_freq_factor, scaling.high_freq_factor
    kept_share = (context_len / wavelength - low) / (high - low)
    between = (1 - kept_share) * plain / scaling.factor + kept_share * plain
    long = wavelength > context_len / low
    short = wavelength < context_len / high
    return torch.where(long, plain / scaling.factor, torch.where(short, plain, between))


def _yarn(plain: Tensor, scaling: RopeScaling, theta: float, head_dim: int) -> Tensor:
    """YaRN's "NTK by parts": fast features keep their frequency, slow ones are divided, a ramp between."""

    def dimension_of(rotations: float) -> float:
        """The feature pair that turns `rotations` times within the original context."""
        ratio = scaling.original_context_len / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    divided_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * divided_share + plain * (1 - divided_share)


class RopeTable:
    """Cosines and signed sines by position, in the model's dtype, grown on demand up to the context length.

    A row of the table is computed once and kept when the table grows, so that a position's values never
    depend on which positions were asked for before.
    """

    def __init__(
        self, frequencies: Tensor, scale: float, context_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`frequencies`: as `inverse_frequencies`; `scale` multiplies every cosine and sine."""
        self._frequencies = frequencies.to(device)
        self._scale = scale
        self._context_len = context_len
        self._table = torch.empty((0, 4 * frequencies.shape[0]), dtype=dtype, device=device)

    def reserve(self, positions: int) -> None:
        """Make rows for positions 0 … positions - 1. Growth doubles, so its cost is spread thin."""
        have = self._table.shape[0]
        if positions <= have:
            return
        assert positions <= self._context_len, "the replica admits nothing beyond the context length"
        want = min(max(positions, 2 * have, _FIRST_POSITIONS), self._context_len)
        self._table = torch.cat((self._table, self._rows(have, want)))

    def at(self, positions: Tensor) -> Tensor:
        """int64[rows] → [rows, 1, 2·head_dim]: cosines, then signed sines, to broadcast over heads."""
        return self._table.index_select(0, positions).unsqueeze(1)

    def _rows(self, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop, dtype=torch.float32, device=self._table.device)
        angles = torch.outer(positions, self._frequencies)
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        return torch.cat((cos, cos, -sin, sin), dim=1).to(self._table.dtype)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn every head by its row's position. x: [rows, heads, head_dim]; `cos_sin` as `RopeTable.at`.

    Returns a new tensor; `x` is left alone. Row-wise.
    """
    head_dim = x.shape[-1]
    cos, sin = cos_sin[..., :head_dim], cos_sin[..., head_dim:]
    return (x * cos).add_(x.roll(head_dim // 2, -1).mul_(sin))
