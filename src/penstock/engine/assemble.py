"""From a checkpoint to the layers of a model: casts, fuses and packs each weight once.

One fused matrix is the largest thing that exists beside the packed weights: q, k and v become one linear, and
so do gate and up. With a plain backend and weights stored in the model's dtype, the other matrices stay views
of the mapped file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine.checkpoint import ROPE_FACTORS, Checkpoint
from penstock.engine.layers import Attention, DecoderLayer, FeedForward, FeedForwardBlock, RmsNorm
from penstock.engine.linear import (
    LinearBackend,
    PackedLinear,
    QuantisedLinearBackend,
    QuantisedRows,
    fuse_rows,
)
from penstock.engine.moe import MixtureOfExperts
from penstock.engine.rope import RopeTable, inverse_frequencies
from penstock.models.config import ModelConfig, RopeConfig


class Assembler:
    """Builds the parts of one model. Used once, while loading."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, backend: LinearBackend
    ) -> None:
        self._checkpoint = checkpoint
        self._config: ModelConfig = checkpoint.config
        self._dtype = dtype
        self._device = device
        self._backend = backend

    def embedding(self) -> Tensor:
        """[vocab, hidden]"""
        return self._checkpoint.take("model.embed_tokens.weight", self._dtype).to(self._device)

    def head(self, embedding: Tensor) -> PackedLinear:
        """The output projection; a tied one is packed from the embedding matrix."""
        if not self._config.tied_embeddings:
            return self._linear(["lm_head"])
        packed = self._pack_quantised(["model.embed_tokens"], None)
        return self._backend.pack(embedding, None) if packed is None else packed

    def final_norm(self) -> RmsNorm:
        return self._norm("model.norm")

    def rope_table(self, rope: RopeConfig) -> RopeTable:
        factors = self._checkpoint.take(ROPE_FACTORS) if self._checkpoint.has(ROPE_FACTORS) else None
        frequencies = inverse_frequencies(rope, self._config.head_dim, factors)
        scale = rope.scaling.attention_factor if rope.scaling else 1.0
        return RopeTable(frequencies, scale, self._config.context_len, self._dtype, self._device)

    def layer(self, layer: int) -> DecoderLayer:
        prefix = f"model.layers.{layer}"
        input_norm = self._norm(f"{prefix}.input_layernorm")
        attention = self._attention(layer, f"{prefix}.self_attn")
        feed_forward = self._feed_forward_block(layer, f"{prefix}.mlp")
        second_norm = self._norm(f"{prefix}.post_attention_layernorm")
        if not self._config.post_norms:
            return DecoderLayer(input_norm, attention, None, second_norm, feed_forward, None)
        return DecoderLayer(
            input_norm,
            attention,
            second_norm,
            self._norm(f"{prefix}.pre_feedforward_layernorm"),
            feed_forward,
            self._norm(f"{prefix}.post_feedforward_layernorm"),
        )

    def _attention(self, layer: int, prefix: str) -> Attention:
        qkv = self._linear([f"{prefix}.{part}_proj" for part in "qkv"])
        output = self._linear([f"{prefix}.o_proj"])
        qk_norm = self._qk_norm(prefix) if self._config.qk_norm else None
        return Attention(layer, qkv, output, qk_norm, self._config)

    def _qk_norm(self, prefix: str) -> RmsNorm:
        """One norm for q's and k's heads together: [heads + kv_heads, head_dim]."""
        q = self._checkpoint.take(f"{prefix}.q_norm.weight").expand(self._config.heads, -1)
        k = self._checkpoint.take(f"{prefix}.k_norm.weight").expand(self._config.kv_heads, -1)
        return RmsNorm(torch.cat((q, k)), self._config, self._dtype, self._device)

    def _feed_forward_block(self, layer: int, prefix: str) -> FeedForwardBlock:
        moe = self._config.moe
        if moe is None or not self._config.is_moe_layer(layer):
            return self._feed_forward(prefix, self._config.ffn)
        experts = [self._feed_forward(f"{prefix}.experts.{e}", moe.ffn) for e in range(moe.experts)]
        return MixtureOfExperts(self._linear([f"{prefix}.gate"]), experts, moe)

    def _feed_forward(self, prefix: str, width: int) -> FeedForward:
        gate_up = self._linear([f"{prefix}.gate_proj", f"{prefix}.up_proj"])
        down = self._linear([f"{prefix}.down_proj"])
        return FeedForward(gate_up, down, self._config, width)

    def _norm(self, module: str) -> RmsNorm:
        weight = self._checkpoint.take(f"{module}.weight")
        return RmsNorm(weight, self._config, self._dtype, self._device)

    def _linear(self, modules: Sequence[str]) -> PackedLinear:
        """The modules' matrices stacked into one and packed, straight from the file's blocks if it can be."""
        bias = self._bias(modules)
        packed = self._pack_quantised(modules, bias)
        if packed is not None:
            return packed
        weights = [self._checkpoint.take(f"{module}.weight", self._dtype) for module in modules]
        return self._backend.pack(fuse_rows(weights, self._dtype, self._device), bias)

    def _bias(self, modules: Sequence[str]) -> Tensor | None:
        if not self._checkpoint.has(f"{modules[0]}.bias"):
            return None
        biases = [self._checkpoint.take(f"{module}.bias") for module in modules]
        return fuse_rows(biases, self._dtype, self._device)

    def _pack_quantised(self, modules: Sequence[str], bias: Tensor | None) -> PackedLinear | None:
        """None where the backend takes no blocks, or the modules are not all stored in one type of them."""
        if not isinstance(self._backend, QuantisedLinearBackend):
            return None
        found = [self._checkpoint.quantised(f"{module}.weight") for module in modules]
        parts = [part for part in found if part is not None]
        if len(parts) != len(modules) or len({part.ggml_type for part in parts}) != 1:
            return None
        data = fuse_rows([part.data for part in parts], torch.uint8, self._device)
        return self._backend.pack_quantised(QuantisedRows(data, parts[0].ggml_type, parts[0].columns), bias)
