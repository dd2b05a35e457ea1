"""One layer of the decoder: norms, attention, feed-forward. Plain objects; every operation is row-wise.

Shapes: `rows` counts tokens of all sequences in the step, concatenated. Nothing reduces over rows, and each
row's arithmetic is the same whatever its neighbours are, apart from the GEMMs, which `linear.py` answers for.
Roundings follow transformers for the same dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.linear import PackedLinear
from penstock.engine.rope import rotate
from penstock.models.config import ModelConfig


class LayerAttention(Protocol):
    """What the model asks of the caller, who alone knows which rows belong to which sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v as layer `layer`'s keys and values of these rows' positions, then attend.

        q: [rows, heads, head_dim]; k, v: [rows, kv_heads, head_dim], after norm and RoPE; views that may be
        strided and must be copied to be kept. Scale, soft-cap and window come from the ModelConfig.
        Returns [rows, heads, head_dim] in q's dtype.
        """
        ...


class FeedForwardBlock(Protocol):
    """The second half of a layer: one dense network, or a mixture of them."""

    @property
    def weight_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] → [rows, hidden], a new tensor."""
        ...


class RmsNorm:
    """x / rms(x) · weight over the last dimension, statistics in float32.

    Llama's rounds to the model's dtype and then multiplies; Gemma's multiplies in float32 and rounds last.
    `weight`: [..., features]; leading dimensions broadcast (one weight a head, for the norm of q and k).
    """

    def __init__(self, weight: Tensor, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._features = (weight.shape[-1],)
        self._eps = config.norm_eps
        self._in_float32 = config.norm_weight_in_float32
        shifted = weight.to(device, torch.float32) + config.norm_weight_offset
        self._weight = shifted if self._in_float32 else shifted.to(dtype)

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self._in_float32:
            return F.rms_norm(x.float(), self._features, None, self._eps).mul_(self._weight).to(x.dtype)
        return F.rms_norm(x, self._features, None, self._eps).mul_(self._weight)


class FeedForward:
    """down(act(gate(x)) · up(x)), with gate and up as one linear of twice the width."""

    def __init__(self, gate_up: PackedLinear, down: PackedLinear, config: ModelConfig, width: int) -> None:
        self._gate_up = gate_up
        self._down = down
        self._width = width
        self._is_silu = config.activation == "silu"

    @property
    def weight_bytes(self) -> int:
        return self._gate_up.weight_bytes + self._down.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self._gate_up(x)
        gate, up = gate_up[:, : self._width], gate_up[:, self._width :]
        gated = F.silu(gate) if self._is_silu else F.gelu(gate, approximate="tanh")
        return self._down(gated.mul_(up))


class Attention:
    """Projections, head norms and RoPE around `LayerAttention.attend`; q, k and v come from one linear."""

    def __init__(
        self,
        layer: int,
        qkv: PackedLinear,
        output: PackedLinear,
        qk_norm: RmsNorm | None,
        config: ModelConfig,
    ) -> None:
        self._layer = layer
        self._qkv = qkv
        self._output = output
        self._qk_norm = qk_norm
        self._heads = config.heads
        self._kv_heads = config.kv_heads
        self._head_dim = config.head_dim

    @property
    def weight_bytes(self) -> int:
        norm_bytes = self._qk_norm.weight_bytes if self._qk_norm else 0
        return self._qkv.weight_bytes + self._output.weight_bytes + norm_bytes

    def __call__(self, x: Tensor, cos_sin: Tensor, attention: LayerAttention) -> Tensor:
        rows = x.shape[0]
        heads = self._qkv(x).view(rows, -1, self._head_dim)
        # q's and k's heads lie side by side: they are normed and rotated as one.
        qk, v = heads[:, : -self._kv_heads], heads[:, -self._kv_heads :]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        qk = rotate(qk, cos_sin)
        mixed = attention.attend(self._layer, qk[:, : self._heads], qk[:, self._heads :], v)
        return self._output(mixed.reshape(rows, -1))


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then feed-forward, each added to what came in; Gemma norms their results too."""

    input_norm: RmsNorm
    attention: Attention
    post_attention_norm: RmsNorm | None
    feed_forward_norm: RmsNorm
    feed_forward: FeedForwardBlock
    post_feed_forward_norm: RmsNorm | None

    @property
    def weight_bytes(self) -> int:
        norms = (
            self.input_norm,
            self.post_attention_norm,
            self.feed_forward_norm,
            self.post_feed_forward_norm,
        )
        norm_bytes = sum(norm.weight_bytes for norm in norms if norm is not None)
        return norm_bytes + self.attention.weight_bytes + self.feed_forward.weight_bytes

    def __call__(self, hidden: Tensor, cos_sin: Tensor, attention: LayerAttention) -> Tensor:
        """[rows, hidden] → [rows, hidden], a new tensor; `hidden` is left alone."""
        mixed = self.attention(self.input_norm(hidden), cos_sin, attention)
        if self.post_attention_norm is not None:
            mixed = self.post_attention_norm(mixed)
        hidden = mixed.add_(hidden)
        fed = self.feed_forward(self.feed_forward_norm(hidden))
        if self.post_feed_forward_norm is not None:
            fed = self.post_feed_forward_norm(fed)
        return fed.add_(hidden)
