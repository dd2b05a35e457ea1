"""Metadata of a GGUF file → `ModelConfig`. Pure.

Keys are those of the GGUF specification, `<arch>.<key>`. What the format leaves to convention follows
llama.cpp, whose converter writes these files: which Gemma layers slide, Gemma's attention scale, that the
head is tied when there is no `output.weight`, that a Qwen3-MoE's chosen experts are normalised, and that
Gemma's norm weights are stored with the one already added.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from penstock.models import limits
from penstock.models.architecture import Architecture, ModelConfig, MoeConfig, RopeConfig, RopeScaling
from penstock.models.config_hf import yarn_mscale
from penstock.models.fields import Fields

_ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": "llama",  # Mistral and Mixtral too
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}
_SUPPORTED_HINT: Final = f"Penstock runs GGUF files of {', '.join(_ARCHITECTURES)}."
_GEMMA_27B_LAYERS: Final = {"gemma2": 46, "gemma3": 62}
"""llama.cpp knows the 27B models, whose attention scale is 1/sqrt(hidden / heads), by their layer count."""
_FLOAT_FILE_TYPES: Final = {0: "float32", 1: "float16"}
"""`general.file_type` of files whose matrices are all of one float type (`enum llama_ftype`)."""


@dataclass(frozen=True, slots=True)
class _Keys:
    """The file's metadata, its architecture prefix and its tensor names."""

    fields: Fields
    arch: str
    tensors: Collection[str]

    def name(self, key: str) -> str:
        return f"{self.arch}.{key}"

    def has(self, key: str) -> bool:
        return self.fields.has(self.name(key))

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        return self.fields.integer(self.name(key), low, high, default)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        return self.fields.number(self.name(key), low, high, default)


def from_gguf(
    metadata: Mapping[str, object], tensors: Collection[str], where: str = "the GGUF file"
) -> ModelConfig:
    """`tensors`: the file's tensor names, which tell a tied head and biases.

    Raises `ModelUnsupported` or `ModelFileDamaged`, both naming the field.
    """
    fields = Fields(metadata, where)
    arch = fields.text("general.architecture")
    if arch not in _ARCHITECTURES:
        fields.refuse("general.architecture", "which the engine does not implement", _SUPPORTED_HINT)
    keys = _Keys(fields, arch, tensors)
    layers = keys.integer("block_count", 1, limits.LAYERS_MAX)
    heads = keys.integer("attention.head_count", 1, limits.HEADS_MAX)
    hidden = keys.integer("embedding_length", 1, limits.WIDTH_MAX)
    head_dim = _head_dim(keys, hidden, heads)
    windows = _windows(keys, layers)
    moe = _moe(keys, layers)
    is_gemma = arch.startswith("gemma")
    return ModelConfig(
        architecture="mixtral" if arch == "llama" and moe else _ARCHITECTURES[arch],
        vocab=_vocab(keys),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(keys, heads),
        head_dim=head_dim,
        ffn=_ffn(keys, moe),
        context_len=keys.integer("context_length", 1, limits.CONTEXT_LEN_MAX),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        layer_rope=_layer_rope(keys, windows),
        sliding_window=windows,
        attention_scale=_attention_scale(keys, hidden, heads, head_dim, layers),
        attention_softcap=_softcap(keys, "attn_logit_softcapping", 50.0),
        final_softcap=_softcap(keys, "final_logit_softcapping", 30.0),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=arch in ("qwen3", "qwen3moe", "gemma3"),
        activation="gelu_tanh" if is_gemma else "silu",
        norm_weight_in_float32=is_gemma,
        post_norms=is_gemma,
        embedding_scale=math.sqrt(hidden) if is_gemma else 1.0,
        tied_embeddings="output.weight" not in tensors,
        moe=moe,
        default_dtype=_FLOAT_FILE_TYPES.get(fields.integer("general.file_type", 0, 1 << 20, 2), "bfloat16"),
        eos_token_ids=_eos_token_ids(fields),
    )


def _head_dim(keys: _Keys, hidden: int, heads: int) -> int:
    rotated = keys.integer("rope.dimension_count", 2, limits.HEAD_DIM_MAX, max(2, hidden // heads))
    head_dim = keys.integer("attention.key_length", 2, limits.HEAD_DIM_MAX, rotated)
    if head_dim % 2:
        keys.fields.damaged(keys.name("attention.key_length"), "even, for rotary embeddings")
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.integer(key, 2, limits.HEAD_DIM_MAX, head_dim) != head_dim:
            keys.fields.refuse(keys.name(key), f"but only the key length, {head_dim}, works", _SUPPORTED_HINT)
    return head_dim


def _kv_heads(keys: _Keys, heads: int) -> int:
    kv_heads = keys.integer("attention.head_count_kv", 1, heads, heads)
    if heads % kv_heads:
        keys.fields.damaged(keys.name("attention.head_count_kv"), f"a divisor of {heads} heads")
    return kv_heads


def _ffn(keys: _Keys, moe: MoeConfig | None) -> int:
    """A model that is experts throughout may leave the dense width out."""
    return keys.integer("feed_forward_length", 1, limits.WIDTH_MAX, moe.ffn if moe else None)


def _vocab(keys: _Keys) -> int:
    if keys.fields.has("tokenizer.ggml.tokens"):
        tokens = keys.fields.items("tokenizer.ggml.tokens", limits.VOCAB_MAX)
        if tokens:
            return len(tokens)
    return keys.integer("vocab_size", 1, limits.VOCAB_MAX)


def _windows(keys: _Keys, layers: int) -> tuple[int | None, ...]:
    window = (
        keys.integer("attention.sliding_window", 0, limits.CONTEXT_LEN_MAX, _window_default(keys)) or None
    )
    if window is not None and keys.arch.startswith("qwen"):
        name = keys.name("attention.sliding_window")
        keys.fields.refuse(name, "and the format does not say which layers slide", _SUPPORTED_HINT)
    return tuple(window if slides else None for slides in _sliding_layers(keys, layers))


def _window_default(keys: _Keys) -> int:
    return 4096 if keys.arch == "gemma2" else 0


def _sliding_layers(keys: _Keys, layers: int) -> list[bool]:
    if not keys.arch.startswith("gemma"):
        return [True] * layers
    name = keys.name("attention.sliding_window_pattern")
    if isinstance(keys.fields.get(name), list):
        slides = keys.fields.items(name, limits.LAYERS_MAX)
        if len(slides) != layers or not all(isinstance(value, bool) for value in slides):
            keys.fields.damaged(name, f"a list of {layers} booleans, one a layer")
        return [value is True for value in slides]
    pattern = keys.fields.integer(name, 1, limits.LAYERS_MAX, 2 if keys.arch == "gemma2" else 6)
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def _layer_rope(keys: _Keys, windows: tuple[int | None, ...]) -> tuple[RopeConfig, ...]:
    theta_default = 1e6 if keys.arch == "gemma3" else 10_000.0
    theta = keys.number("rope.freq_base", 1.0, limits.THETA_MAX, theta_default)
    full = RopeConfig(theta, _scaling(keys))
    if keys.arch != "gemma3":
        return (full,) * len(windows)
    local = RopeConfig(keys.number("rope.freq_base_swa", 1.0, limits.THETA_MAX, 10_000.0))
    return tuple(full if window is None else local for window in windows)


def _scaling(keys: _Keys) -> RopeScaling | None:
    """Llama 3's scaling is not here: its converter writes it as the tensor `rope_freqs.weight`."""
    name = keys.name("rope.scaling.type")
    kind = keys.fields.text(name, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        keys.fields.refuse(name, "which is not implemented", "Implemented are none, linear and yarn.")
    factor = keys.number("rope.scaling.factor", 1e-3, limits.FACTOR_MAX)
    if kind == "linear":
        return RopeScaling("linear", factor)
    context_len = keys.integer("context_length", 1, limits.CONTEXT_LEN_MAX)
    extra = keys.number("rope.scaling.attn_factor", 0.0, limits.SCALAR_MAX, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        keys.integer("rope.scaling.original_context_length", 1, limits.CONTEXT_LEN_MAX, context_len),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 1e-3, limits.FACTOR_MAX, 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1e-3, limits.FACTOR_MAX, 1.0),
        attention_factor=extra * yarn_mscale(factor),
    )


def _attention_scale(keys: _Keys, hidden: int, heads: int, head_dim: int, layers: int) -> float:
    is_27b = _GEMMA_27B_LAYERS.get(keys.arch) == layers
    default = 1.0 / math.sqrt(hidden / heads if is_27b else head_dim)
    return keys.number("attention.scale", 0.0, limits.SCALAR_MAX, default) or default


def _softcap(keys: _Keys, key: str, gemma2_default: float) -> float | None:
    if keys.arch == "gemma2":
        return keys.number(key, 1e-3, limits.SOFTCAP_MAX, gemma2_default)
    if keys.arch == "gemma3" and keys.has(key):
        return keys.number(key, 0.0, limits.SOFTCAP_MAX) or None
    return None


def _moe(keys: _Keys, layers: int) -> MoeConfig | None:
    if keys.arch not in ("llama", "qwen3moe"):
        return None
    experts_max = min(limits.EXPERTS_MAX, limits.EXPERTS_ALL_LAYERS_MAX // layers)
    experts = keys.integer("expert_count", 0, experts_max, 0 if keys.arch == "llama" else None)
    if experts == 0:
        return None
    # Mixtral's files give only the dense width, which is its experts'.
    dense = keys.integer("feed_forward_length", 1, limits.WIDTH_MAX) if keys.arch == "llama" else None
    return MoeConfig(
        experts=experts,
        experts_per_token=keys.integer("expert_used_count", 1, experts),
        ffn=keys.integer("expert_feed_forward_length", 1, limits.WIDTH_MAX, dense),
        norm_topk_prob=keys.fields.flag(keys.name("expert_weights_norm"), True),
        layers=frozenset(range(layers)),
    )


def _eos_token_ids(fields: Fields) -> frozenset[int]:
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return frozenset(fields.integer(name, 0, limits.VOCAB_MAX) for name in names if fields.has(name))
