"""The shape of a decoder-only transformer, as data: everything the engine must know, and no tensor.

One dataclass covers Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, Mixtral and Qwen3-MoE; they differ only
in the values here. All of it is pure. Weights are named as `transformers` names them ("canonical" names):

    model.embed_tokens.weight                          [vocab, hidden]
    model.layers.N.self_attn.{q,k,v,o}_proj.weight     [out, in]
    model.layers.N.mlp.{gate,up,down}_proj.weight      [out, in]
    model.layers.N.mlp.gate.weight                     [experts, hidden]: the router of a mixture of experts
    model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight
    model.norm.weight, lm_head.weight

`weight_shapes` lists them all, so that a checkpoint can check what it reads before anything computes on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"]
Activation = Literal["silu", "gelu_tanh"]
ScalingKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context the model was trained with.

    `linear` divides every frequency by `factor`. `llama3` divides the low ones and interpolates in between
    (Llama 3.1 release, `low_freq_factor`, `high_freq_factor`). `yarn` mixes divided and plain frequencies by
    a ramp between `beta_fast` and `beta_slow` rotations, and multiplies cos and sin by `attention_factor`
    (Peng et al., "YaRN", 2023, sections 3.2 to 3.4).
    """

    kind: ScalingKind
    factor: float
    original_context_len: int = 0  # llama3 and yarn only
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer; `theta` is the base of its wavelengths."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """A mixture of experts in place of the feed-forward block of the listed layers."""

    experts: int
    experts_per_token: int
    ffn: int
    norm_topk_prob: bool  # the chosen experts' probabilities are scaled to add up to one
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. Counts are of heads, layers and so on; widths are numbers of features."""

    architecture: Architecture
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # width of the dense feed-forward block
    context_len: int
    norm_eps: float
    layer_rope: tuple[RopeConfig, ...]  # one a layer
    # One a layer: a token attends to itself and the `window - 1` tokens before it; None: to all before it.
    sliding_window: tuple[int | None, ...]
    attention_scale: float  # multiplies q·k
    attention_softcap: float | None = None  # scores become cap·tanh(score / cap), before the mask
    final_softcap: float | None = None  # the same, on the logits
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before RoPE
    activation: Activation = "silu"
    # Gemma multiplies by the weight in float32 and rounds after; Llama rounds first.
    norm_weight_in_float32: bool = False
    norm_weight_offset: float = 0.0  # added to the stored weight: Gemma's safetensors hold w of (1 + w)
    post_norms: bool = False  # Gemma: further norms behind attention and feed-forward
    embedding_scale: float = 1.0
    tied_embeddings: bool = False  # the output head is the embedding matrix
    moe: MoeConfig | None = None
    default_dtype: str = "bfloat16"  # float32, float16 or bfloat16; what the file suggests to compute in
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        assert len(self.layer_rope) == len(self.sliding_window) == self.layers
        assert self.heads % self.kv_heads == 0 and self.head_dim % 2 == 0

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token keeps, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes

    def parameter_count(self) -> int:
        """Distinct weights; a tied head counts once."""
        return sum(math.prod(shape) for shape in weight_shapes(self).values())


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every tensor that a checkpoint of `config` must hold."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, config.hidden)}
    for layer in range(config.layers):
        shapes |= _layer_shapes(config, layer)
    shapes["model.norm.weight"] = (config.hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab, config.hidden)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}"
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{norm}.weight": (config.hidden,) for norm in norms}
    shapes |= _attention_shapes(config, f"{prefix}.self_attn")
    if not config.is_moe_layer(layer):
        return shapes | _ffn_shapes(config, f"{prefix}.mlp", config.ffn)
    assert config.moe is not None
    shapes[f"{prefix}.mlp.gate.weight"] = (config.moe.experts, config.hidden)
    for expert in range(config.moe.experts):
        shapes |= _ffn_shapes(config, f"{prefix}.mlp.experts.{expert}", config.moe.ffn)
    return shapes


def _attention_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.q_proj.weight": (q_width, config.hidden),
        f"{prefix}.k_proj.weight": (kv_width, config.hidden),
        f"{prefix}.v_proj.weight": (kv_width, config.hidden),
        f"{prefix}.o_proj.weight": (config.hidden, q_width),
    }
    if config.qkv_bias:
        widths = (("q", q_width), ("k", kv_width), ("v", kv_width))
        shapes |= {f"{prefix}.{part}_proj.bias": (width,) for part, width in widths}
    if config.output_bias:
        shapes[f"{prefix}.o_proj.bias"] = (config.hidden,)
    if config.qk_norm:
        shapes |= {f"{prefix}.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    return shapes


def _ffn_shapes(config: ModelConfig, prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.gate_proj.weight": (width, config.hidden),
        f"{prefix}.up_proj.weight": (width, config.hidden),
        f"{prefix}.down_proj.weight": (config.hidden, width),
    }
    if config.mlp_bias:
        widths = (("gate", width), ("up", width), ("down", config.hidden))
        shapes |= {f"{prefix}.{part}_proj.bias": (size,) for part, size in widths}
    return shapes
