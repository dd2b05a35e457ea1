"""`config.json` of a Hugging Face folder → `ModelConfig`. Pure.

Both spellings are read: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`,
`rope_local_base_freq`) and that of transformers 5 (`rope_parameters`, `dtype`). A field that is absent takes
the default of that architecture's configuration class in transformers; sizes have no default. An option that
the engine does not implement is refused by name rather than ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

from penstock.core.errors import ModelUnsupported
from penstock.models import limits
from penstock.models.architecture import (
    Activation,
    Architecture,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RopeScaling,
)
from penstock.models.fields import Fields

_SUPPORTED_HINT: Final = f"Penstock runs {', '.join(get_args(Architecture))}."


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between architectures in their configuration class, beyond the values in the file."""

    architecture: Architecture
    head_dim: int | None = None  # default; None: hidden / heads
    norm_eps: float = 1e-6
    theta: float = 10_000.0
    local_theta: float | None = None  # of sliding-window layers, where it differs
    sliding_window: int | None = None  # default
    alternating_windows: bool = False  # `layer_types` says which layers slide
    window_switch: bool = False  # `use_sliding_window` turns them on
    bias_field: bool = False  # `attention_bias` covers q, k, v and o
    qkv_bias: bool = False  # always, and not on o
    qk_norm: bool = False
    is_gemma: bool = False


_FAMILIES: Final = {
    "llama": _Family("llama", bias_field=True),
    "mistral": _Family("mistral", sliding_window=4096),
    "mixtral": _Family("mixtral", norm_eps=1e-5, theta=1e6),
    "qwen2": _Family(
        "qwen2", sliding_window=4096, alternating_windows=True, window_switch=True, qkv_bias=True
    ),
    "qwen3": _Family(
        "qwen3",
        head_dim=128,
        sliding_window=4096,
        alternating_windows=True,
        window_switch=True,
        bias_field=True,
        qk_norm=True,
    ),
    "qwen3_moe": _Family("qwen3_moe", sliding_window=4096, window_switch=True, bias_field=True, qk_norm=True),
    "gemma2": _Family(
        "gemma2", head_dim=256, sliding_window=4096, alternating_windows=True, bias_field=True, is_gemma=True
    ),
    "gemma3_text": _Family(
        "gemma3",
        head_dim=256,
        theta=1e6,
        local_theta=10_000.0,
        sliding_window=4096,
        alternating_windows=True,
        bias_field=True,
        qk_norm=True,
        is_gemma=True,
    ),
}


def from_hf(values: Mapping[str, object], where: str = "config.json") -> ModelConfig:
    """Raises `ModelUnsupported` or `ModelFileDamaged`, both naming the field."""
    fields = Fields(values, where)
    family = _family(fields)
    _refuse_options(fields)
    hidden = fields.integer("hidden_size", 1, limits.WIDTH_MAX)
    layers = fields.integer("num_hidden_layers", 1, limits.LAYERS_MAX)
    heads = fields.integer("num_attention_heads", 1, limits.HEADS_MAX)
    head_dim = _head_dim(fields, family, hidden, heads)
    windows = _windows(fields, family, layers)
    has_attention_bias = family.bias_field and fields.flag("attention_bias", False)
    gemma = family.is_gemma
    return ModelConfig(
        architecture=family.architecture,
        vocab=fields.integer("vocab_size", 1, limits.VOCAB_MAX),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        ffn=fields.integer("intermediate_size", 1, limits.WIDTH_MAX),
        context_len=fields.integer("max_position_embeddings", 1, limits.CONTEXT_LEN_MAX),
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, family.norm_eps),
        layer_rope=_layer_rope(fields, family, windows),
        sliding_window=windows,
        attention_scale=_attention_scale(fields, head_dim, gemma),
        attention_softcap=_softcap(fields, "attn_logit_softcapping", family, 50.0),
        final_softcap=_softcap(fields, "final_logit_softcapping", family, 30.0),
        qkv_bias=family.qkv_bias or has_attention_bias,
        output_bias=has_attention_bias,
        mlp_bias=family.architecture == "llama" and fields.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        activation=_activation(fields, gemma),
        norm_weight_in_float32=gemma,
        norm_weight_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        tied_embeddings=fields.flag("tie_word_embeddings", gemma),
        moe=_moe(fields, family, layers),
        default_dtype=_default_dtype(fields),
        eos_token_ids=eos_token_ids(fields),
    )


def eos_token_ids(fields: Fields) -> frozenset[int]:
    """`eos_token_id` is one number or a list; generation_config.json spells it the same way."""
    value = fields.get("eos_token_id")
    listed = fields.items("eos_token_id", limits.EOS_TOKENS_MAX) if isinstance(value, list) else [value]
    ids = Fields({str(index): item for index, item in enumerate(listed)}, f"{fields.where}, `eos_token_id`")
    return frozenset(
        ids.integer(str(index), 0, limits.VOCAB_MAX) for index, item in enumerate(listed) if item is not None
    )


def _family(fields: Fields) -> _Family:
    model_type = fields.text("model_type")
    if model_type not in _FAMILIES:
        fields.refuse(
            "model_type", "which is not an architecture that the engine implements", _SUPPORTED_HINT
        )
    classes = fields.items("architectures", 16)
    if classes and not any(isinstance(name, str) and name.endswith("ForCausalLM") for name in classes):
        raise ModelUnsupported(
            f"{fields.where}: `architectures` names no `…ForCausalLM` class.",
            hint="Penstock generates text; take a checkpoint with a language-model head.",
        )
    return _FAMILIES[model_type]


def _refuse_options(fields: Fields) -> None:
    if fields.has("quantization_config"):
        method = fields.section("quantization_config").get("quant_method")
        raise ModelUnsupported(
            f"{fields.where}: `quantization_config` ({str(method)[:40]}) is not implemented.",
            hint="Take the unquantised safetensors, or a GGUF file for quantised weights.",
        )
    for name in ("use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention"):
        if fields.has(name) and fields.flag(name, False):
            fields.refuse(name, "which is not implemented", _SUPPORTED_HINT)


def _head_dim(fields: Fields, family: _Family, hidden: int, heads: int) -> int:
    if family.head_dim is None and not fields.has("head_dim") and hidden % heads:
        fields.damaged("num_attention_heads", f"a divisor of the hidden size {hidden}")
    head_dim = fields.integer("head_dim", 1, limits.HEAD_DIM_MAX, family.head_dim or max(1, hidden // heads))
    if head_dim % 2:
        fields.damaged("head_dim", "even, for rotary embeddings")
    return head_dim


def _kv_heads(fields: Fields, heads: int) -> int:
    kv_heads = fields.integer("num_key_value_heads", 1, heads, heads)
    if heads % kv_heads:
        fields.damaged("num_key_value_heads", f"a divisor of {heads} heads")
    return kv_heads


def _windows(fields: Fields, family: _Family, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; None is full attention."""
    if family.window_switch and not fields.flag("use_sliding_window", False):
        window = None
    elif "sliding_window" in fields or family.sliding_window is None:
        window = _optional_window(fields)
    else:
        window = family.sliding_window
    slides = _sliding_layers(fields, family, layers)
    if window is None and family.is_gemma and any(slides):
        fields.damaged("sliding_window", "a number of tokens, because some layers slide")
    return tuple(window if is_sliding else None for is_sliding in slides)


def _optional_window(fields: Fields) -> int | None:
    if not fields.has("sliding_window"):
        return None
    return fields.integer("sliding_window", 1, limits.CONTEXT_LEN_MAX)


def _sliding_layers(fields: Fields, family: _Family, layers: int) -> list[bool]:
    """Whether each layer slides, if the model has a window at all."""
    if not family.alternating_windows:
        if len({str(kind) for kind in fields.items("layer_types", limits.LAYERS_MAX)}) > 1:
            fields.refuse("layer_types", f"but {family.architecture} layers are all alike", _SUPPORTED_HINT)
        return [True] * layers
    if fields.has("layer_types"):
        return _listed_layers(fields, layers)
    if family.is_gemma:
        pattern_default = 2 if family.architecture == "gemma2" else 6
        pattern = fields.integer("sliding_window_pattern", 1, limits.LAYERS_MAX, pattern_default)
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    first = fields.integer("max_window_layers", 0, limits.LAYERS_MAX, 28)
    return [layer >= first for layer in range(layers)]


def _listed_layers(fields: Fields, layers: int) -> list[bool]:
    kinds = fields.items("layer_types", limits.LAYERS_MAX)
    if len(kinds) != layers:
        fields.damaged("layer_types", f"a list of {layers} values, one a layer")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ModelUnsupported(
                f"{fields.where}: `layer_types` contains `{str(kind)[:40]}`, which is not implemented.",
                hint="Implemented are `sliding_attention` and `full_attention`.",
            )
    return [kind == "sliding_attention" for kind in kinds]


def _layer_rope(fields: Fields, family: _Family, windows: tuple[int | None, ...]) -> tuple[RopeConfig, ...]:
    """One rotary embedding for all layers, or one for the sliding and one for the full ones (Gemma 3)."""
    if family.local_theta is None:
        shared = _rope(fields, _rope_fields(fields), family.theta, "rope_theta")
        return (shared,) * len(windows)
    nested = fields.section("rope_parameters")
    if nested.has("full_attention") or nested.has("sliding_attention"):
        full_fields, local_fields = nested.section("full_attention"), nested.section("sliding_attention")
    else:
        full_fields, local_fields = _rope_fields(fields), Fields({}, fields.where)
    full = _rope(fields, full_fields, family.theta, "rope_theta")
    local = _rope(fields, local_fields, family.local_theta, "rope_local_base_freq")
    return tuple(full if window is None else local for window in windows)


def _rope_fields(fields: Fields) -> Fields:
    """Transformers 5 has `rope_parameters`, transformers 4 `rope_scaling`; a newer file may have both."""
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def _rope(fields: Fields, rope: Fields, theta_default: float, theta_field: str) -> RopeConfig:
    theta = fields.number(theta_field, 1.0, limits.THETA_MAX, theta_default)
    for name in ("full_attention", "sliding_attention", "mrope_section"):
        if rope.has(name):
            rope.refuse(name, "but this architecture has one plain rotary embedding", _SUPPORTED_HINT)
    for place in (fields, rope):
        if place.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            place.refuse("partial_rotary_factor", "but only whole heads are rotated", _SUPPORTED_HINT)
    return RopeConfig(
        theta=rope.number("rope_theta", 1.0, limits.THETA_MAX, theta),
        scaling=_scaling(fields, rope),
    )


def _scaling(fields: Fields, rope: Fields) -> RopeScaling | None:
    name = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.text(name, "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        rope.refuse(name, "which is not implemented", "Implemented are default, linear, llama3 and yarn.")
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor", 1e-3, limits.FACTOR_MAX))
    context_len = fields.integer("max_position_embeddings", 1, limits.CONTEXT_LEN_MAX)
    original = rope.integer("original_max_position_embeddings", 1, limits.CONTEXT_LEN_MAX, context_len)
    if kind == "yarn":
        return _yarn(rope, context_len, original)
    low = rope.number("low_freq_factor", 1e-3, limits.FACTOR_MAX)
    high = rope.number("high_freq_factor", 1e-3, limits.FACTOR_MAX)
    if high <= low:
        rope.damaged("high_freq_factor", f"above `low_freq_factor`, {low:g}")
    factor = rope.number("factor", 1e-3, limits.FACTOR_MAX)
    return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: Fields, context_len: int, original: int) -> RopeScaling:
    factor = rope.number("factor", 1e-3, limits.FACTOR_MAX, context_len / original)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast", 0.0, limits.FACTOR_MAX, 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0.0, limits.FACTOR_MAX, 1.0) or 1.0,
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=rope.flag("truncate", True),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """YaRN equation 22, and DeepSeek's variant with `mscale` over `mscale_all_dim`."""
    mscale = rope.number("mscale", 0.0, limits.SCALAR_MAX, 0.0)
    mscale_all_dim = rope.number("mscale_all_dim", 0.0, limits.SCALAR_MAX, 0.0)
    inferred = yarn_mscale(factor)
    if mscale and mscale_all_dim:
        inferred = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return rope.number("attention_factor", 0.0, limits.SCALAR_MAX, inferred)


def yarn_mscale(factor: float, slope: float = 1.0) -> float:
    """0.1·slope·ln(factor) + 1 for factors above one."""
    return 1.0 if factor <= 1.0 else 0.1 * slope * math.log(factor) + 1.0


def _attention_scale(fields: Fields, head_dim: int, is_gemma: bool) -> float:
    if not is_gemma:
        return 1.0 / math.sqrt(head_dim)
    return 1.0 / math.sqrt(fields.number("query_pre_attn_scalar", 1e-3, limits.SCALAR_MAX, 256.0))


def _softcap(fields: Fields, name: str, family: _Family, gemma2_default: float) -> float | None:
    """Gemma only; an explicit null turns it off."""
    if not family.is_gemma:
        return None
    if name not in fields and family.architecture == "gemma2":
        return gemma2_default
    return fields.optional_number(name, 1e-3, limits.SOFTCAP_MAX)


def _activation(fields: Fields, is_gemma: bool) -> Activation:
    name = "hidden_activation" if is_gemma else "hidden_act"
    value = fields.text(name, "gelu_pytorch_tanh" if is_gemma else "silu")
    if value in ("silu", "swish"):
        return "silu"
    if value == "gelu_pytorch_tanh":
        return "gelu_tanh"
    fields.refuse(name, "which is not implemented", "Implemented are silu and gelu_pytorch_tanh.")


def _moe(fields: Fields, family: _Family, layers: int) -> MoeConfig | None:
    if family.architecture not in ("mixtral", "qwen3_moe"):
        return None
    # `attribute_map` of both classes: transformers 5 writes `num_local_experts` for either.
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    experts = fields.integer(name, 1, min(limits.EXPERTS_MAX, limits.EXPERTS_ALL_LAYERS_MAX // layers))
    if family.architecture == "mixtral":
        ffn = fields.integer("intermediate_size", 1, limits.WIDTH_MAX)
        per_token = fields.integer("num_experts_per_tok", 1, experts, 2)
        return MoeConfig(experts, per_token, ffn, True, frozenset(range(layers)))
    return MoeConfig(
        experts=experts,
        experts_per_token=fields.integer("num_experts_per_tok", 1, experts),
        ffn=fields.integer("moe_intermediate_size", 1, limits.WIDTH_MAX),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
        layers=_moe_layers(fields, layers),
    )


def _moe_layers(fields: Fields, layers: int) -> frozenset[int]:
    step = fields.integer("decoder_sparse_step", 1, limits.LAYERS_MAX, 1)
    dense = fields.items("mlp_only_layers", limits.LAYERS_MAX)
    return frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _default_dtype(fields: Fields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    value = fields.text(name, "float32").removeprefix("torch.")
    if value not in ("float32", "float16", "bfloat16"):
        fields.refuse(name, "which is not a float type we compute in", "Use float32, float16 or bfloat16.")
    return value
