"""Where a canonical weight stands in a GGUF file: pure name and row arithmetic.

Names on the right are those of llama.cpp's converter (`gguf-py/gguf/constants.py`, MODEL_TENSOR_NAMES).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from penstock.models.config import ModelConfig

_GLOBAL: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_IN_LAYER_WITH_POST_NORMS: Final = _IN_LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT: Final = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")


@dataclass(frozen=True, slots=True)
class GgufPlace:
    """The tensor that holds a weight, and which expert of a stack it is (None: the tensor is the weight)."""

    name: str
    expert: int | None = None


def gguf_place(config: ModelConfig, name: str) -> GgufPlace:
    """`name` is one of `weight_shapes(config)`."""
    if name in _GLOBAL:
        return GgufPlace(_GLOBAL[name])
    matched = _LAYER.fullmatch(name)
    assert matched is not None, f"`{name}` is not a canonical name"
    layer, module, kind = matched.groups()
    if expert := _EXPERT.fullmatch(module):
        return GgufPlace(f"blk.{layer}.ffn_{expert[2]}_exps.{kind}", int(expert[1]))
    names = _IN_LAYER_WITH_POST_NORMS if config.post_norms else _IN_LAYER
    return GgufPlace(f"blk.{layer}.{names[module]}.{kind}")


def half_split_order(config: ModelConfig, name: str) -> Tensor | None:
    """Row order that undoes the converter's interleaving, int64[rows]; None where there is none.

    For `llama` files the converter reorders the rows of q and k within each head, from (half, pair) to
    (pair, half), to suit ggml's interleaved rotary kernel. Ours is half-split, so the rows go back.
    """
    if config.architecture not in ("llama", "mistral", "mixtral"):
        return None
    if ".q_proj." in name:
        heads = config.heads
    elif ".k_proj." in name:
        heads = config.kv_heads
    else:
        return None
    rows = torch.arange(heads * config.head_dim)
    return rows.view(heads, config.head_dim // 2, 2).transpose(1, 2).reshape(-1)
