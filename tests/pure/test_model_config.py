"""config.json and GGUF metadata of published models become the right `ModelConfig`; the rest is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import ModelError, ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.models.config import (
    ModelConfig,
    RopeConfig,
    RopeScaling,
    folder_config,
    from_gguf,
    from_hf,
    weight_shapes,
)

# The fields that matter of published files, in the spelling of the transformers version that wrote them.
LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B_V01: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMOLLM2_GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 3,
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
    "llama.vocab_size": 49152,
    "tokenizer.ggml.eos_token_id": 2,
}
GEMMA_3_27B_GGUF: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 62,
    "gemma3.context_length": 131072,
    "gemma3.embedding_length": 5376,
    "gemma3.feed_forward_length": 21504,
    "gemma3.attention.head_count": 32,
    "gemma3.attention.head_count_kv": 16,
    "gemma3.attention.key_length": 128,
    "gemma3.attention.value_length": 128,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 1024,
    "gemma3.rope.freq_base": 1000000.0,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
    "tokenizer.ggml.tokens": ["a"] * 300,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 106,
}


def test_llama_31_in_the_old_spelling() -> None:
    config = from_hf(LLAMA_31_8B)
    assert (
        config.layer_rope
        == (
            RopeConfig(
                500_000.0, RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
            ),
        )
        * 32
    )
    assert config.head_dim == 128 and config.kv_heads == 8 and not config.tied_embeddings
    assert config.eos_token_ids == {128001, 128008, 128009}
    assert config.default_dtype == "bfloat16"
    assert config.parameter_count() == 8_030_261_248  # as published
    assert config.kv_bytes_per_token(2) == 131_072


def test_the_new_spelling_means_the_same() -> None:
    new = dict(LLAMA_31_8B)
    new["rope_parameters"] = new.pop("rope_scaling") | {"rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    assert from_hf(new) == from_hf(LLAMA_31_8B)


def test_mistral_windows_every_layer_unless_told_otherwise() -> None:
    assert from_hf(MISTRAL_7B_V01).sliding_window == (4096,) * 32
    assert from_hf(MISTRAL_7B_V01 | {"sliding_window": None}).sliding_window == (None,) * 32
    absent = {key: value for key, value in MISTRAL_7B_V01.items() if key != "sliding_window"}
    assert from_hf(absent).sliding_window == (4096,) * 32
    assert from_hf(MISTRAL_7B_V01).parameter_count() == 7_241_732_096


def test_gemma_3_alternates_windows_and_bases() -> None:
    config = from_hf(GEMMA_3_1B)
    assert config.sliding_window[:7] == (512, 512, 512, 512, 512, None, 512)
    assert config.layer_rope[0].theta == 10_000 and config.layer_rope[5].theta == 1_000_000
    assert config.tied_embeddings and config.post_norms and config.qk_norm
    assert config.norm_weight_offset == 1.0 and config.norm_weight_in_float32
    assert config.embedding_scale == math.sqrt(1152) and config.attention_scale == 1 / 16
    assert config.parameter_count() == 999_885_952


def test_gemma_3_scaling_covers_the_global_layers_only() -> None:
    config = from_hf(GEMMA_3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert config.layer_rope[5].scaling == RopeScaling("linear", 8.0)
    assert config.layer_rope[0].scaling is None


def test_gemma_2_caps_by_default() -> None:
    gemma2 = GEMMA_3_1B | {"model_type": "gemma2"}
    absent = {key: value for key, value in gemma2.items() if not key.endswith("softcapping")}
    config = from_hf(absent)
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert from_hf(gemma2).attention_softcap is None, "an explicit null turns it off"


def test_qwen3_moe_counts_all_experts() -> None:
    config = from_hf(QWEN3_30B_A3B)
    assert config.moe is not None and config.moe.norm_topk_prob and len(config.moe.layers) == 48
    assert config.parameter_count() == 30_532_122_624


def test_qwen2_slides_only_when_switched_on() -> None:
    qwen2 = MISTRAL_7B_V01 | {"model_type": "qwen2", "max_window_layers": 30}
    assert from_hf(qwen2).sliding_window == (None,) * 32
    switched_on = from_hf(qwen2 | {"use_sliding_window": True})
    assert switched_on.sliding_window == (None,) * 30 + (4096,) * 2
    assert switched_on.qkv_bias and not switched_on.output_bias


def test_generation_config_adds_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B_V01))
    assert folder_config(tmp_path).eos_token_ids == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert folder_config(tmp_path).eos_token_ids == {2, 7}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"dtype": "float8_e4m3fn"}, "float8"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"layer_types": ["sliding_attention"] * 31 + ["full_attention"]}, "layer_types"),
    ],
)
def test_options_we_lack_are_named(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelUnsupported, match=word) as caught:
        from_hf(LLAMA_31_8B | changes)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "4096"),
        ("hidden_size", -1),
        ("hidden_size", 10**400),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("num_attention_heads", 31),
        ("num_key_value_heads", 5),
        ("num_key_value_heads", 64),
        ("head_dim", 127),
        ("vocab_size", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("max_position_embeddings", 1 << 60),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", "</s>"),
        ("rope_scaling", "yarn"),
        ("architectures", {"a": 1}),
    ],
)
def test_nonsense_is_named(field: str, value: object) -> None:
    with pytest.raises(ModelFileDamaged, match=field) as caught:
        from_hf(LLAMA_31_8B | {field: value})
    assert caught.value.hint and len(caught.value.message) < 300


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 200_000, "1" * 5000, "\xff", " " * (5 << 20)])
def test_a_config_file_that_is_no_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelFileDamaged, match=r"config\.json"):
        folder_config(tmp_path)


def test_a_folder_without_a_config_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotAvailable, match=r"config\.json"):
        folder_config(tmp_path)


def test_smollm2_metadata() -> None:
    config = from_gguf(SMOLLM2_GGUF, {"token_embd.weight"})
    assert (config.architecture, config.vocab, config.head_dim) == ("llama", 49152, 64)
    assert config.tied_embeddings and config.eos_token_ids == {2}
    assert config.kv_bytes_per_token(2) == 23_040
    assert config.parameter_count() == 134_515_008
    assert not from_gguf(SMOLLM2_GGUF, {"output.weight"}).tied_embeddings


def test_gemma_3_27b_metadata() -> None:
    config = from_gguf(GEMMA_3_27B_GGUF, ())
    assert config.attention_scale == pytest.approx(168**-0.5), "llama.cpp's exception for the 27B model"
    smaller = from_gguf(GEMMA_3_27B_GGUF | {"gemma3.block_count": 34}, ())
    assert smaller.attention_scale == pytest.approx(128**-0.5)
    assert config.sliding_window[4:6] == (1024, None)
    assert config.layer_rope[4] == RopeConfig(10_000.0)
    assert config.layer_rope[5] == RopeConfig(1_000_000.0, RopeScaling("linear", 8.0))
    assert config.norm_weight_offset == 0.0 and config.norm_weight_in_float32
    assert config.vocab == 300 and config.eos_token_ids == {1, 106}


def test_a_llama_gguf_with_experts_is_mixtral() -> None:
    mixtral = SMOLLM2_GGUF | {"llama.expert_count": 8, "llama.expert_used_count": 2}
    config = from_gguf(mixtral, ())
    assert config.architecture == "mixtral" and config.moe is not None
    assert config.moe.ffn == 1536 and config.moe.norm_topk_prob


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"general.architecture": "mamba"}, ModelUnsupported, "mamba"),
        ({"general.architecture": None}, ModelFileDamaged, "general.architecture"),
        ({"llama.rope.scaling.type": "longrope"}, ModelUnsupported, "longrope"),
        ({"llama.rope.dimension_count": 32, "llama.attention.key_length": 64}, ModelUnsupported, "dimension"),
        ({"llama.attention.value_length": 32}, ModelUnsupported, "value_length"),
        ({"llama.block_count": 1 << 40}, ModelFileDamaged, "block_count"),
        ({"llama.attention.head_count_kv": [3, 3]}, ModelFileDamaged, "head_count_kv"),
        ({"llama.attention.head_count_kv": 4}, ModelFileDamaged, "head_count_kv"),
        ({"llama.expert_count": 1 << 20}, ModelFileDamaged, "expert_count"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ModelFileDamaged, "epsilon"),
    ],
)
def test_metadata_is_refused_by_name(changes: dict[str, Any], error: type[ModelError], word: str) -> None:
    with pytest.raises(error, match=word) as caught:
        from_gguf(SMOLLM2_GGUF | changes, ())
    assert caught.value.hint


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 2000),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-1, 40), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), st.integers(0, 9)),
)
_BASES = (LLAMA_31_8B, MISTRAL_7B_V01, GEMMA_3_1B, QWEN3_30B_A3B)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), base=st.sampled_from(_BASES))
def test_any_config_is_read_or_refused(data: st.DataObject, base: dict[str, Any]) -> None:
    fields = data.draw(st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=3))
    _read_or_refuse(lambda: from_hf(base | {field: data.draw(_ODD) for field in fields}))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), base=st.sampled_from((SMOLLM2_GGUF, GEMMA_3_27B_GGUF)))
def test_any_metadata_is_read_or_refused(data: st.DataObject, base: dict[str, Any]) -> None:
    fields = data.draw(st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=3))
    _read_or_refuse(lambda: from_gguf(base | {field: data.draw(_ODD) for field in fields}, ()))


def _read_or_refuse(read: Any) -> None:
    """A config that is accepted is one that the engine could allocate shapes for."""
    try:
        config: ModelConfig = read()
    except ModelError as error:
        assert error.hint
        return
    if config.layers * (config.moe.experts if config.moe else 1) < 2000:
        assert all(size > 0 for shape in weight_shapes(config).values() for size in shape)
