"""Writing a tiny transformers model as GGUF, by llama.cpp's conventions, with the `gguf` package's names.

The reference model is then given the weights that the file really holds (dequantised by the package), so that
logits can be compared closely whatever the quantisation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")


@torch.no_grad()
def write_gguf(model: Any, path: Path, matrices: GGMLQuantizationType) -> None:
    """Save `model` with its matrices in type `matrices`, and round the model's own weights to match."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_metadata(writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        for gguf_name, weight in _file_tensors(name, parameter, names):
            stored = _round(weight, matrices)
            weight.copy_(stored[0])
            writer.add_tensor(gguf_name, _to_file(name, stored[1], config), raw_dtype=stored[2])
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _file_tensors(name: str, parameter: torch.Tensor, names: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors for one parameter, as views; transformers keeps gate and up of experts as one."""
    experts = _EXPERTS.fullmatch(name)
    if experts is None:
        yield _gguf_name(name, names), parameter
    elif experts[2] == "down":
        yield f"blk.{experts[1]}.ffn_down_exps.weight", parameter
    else:
        half = parameter.shape[1] // 2
        yield f"blk.{experts[1]}.ffn_gate_exps.weight", parameter[:, :half]
        yield f"blk.{experts[1]}.ffn_up_exps.weight", parameter[:, half:]


def _gguf_name(name: str, names: Any) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def _round(
    weight: torch.Tensor, matrices: GGMLQuantizationType
) -> tuple[torch.Tensor, np.ndarray, GGMLQuantizationType]:
    """What the type makes of the weight, the bytes to store, and the type; vectors stay float32."""
    if weight.ndim == 1:
        return weight, weight.numpy(), GGMLQuantizationType.F32
    stored = gguf.quants.quantize(weight.contiguous().numpy(), matrices)
    return torch.from_numpy(gguf.quants.dequantize(stored, matrices)), stored, matrices


def _to_file(name: str, stored: np.ndarray, config: Any) -> np.ndarray:
    """The converter's changes: interleaved rows of q and k for `llama`, one added to Gemma's norms."""
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return stored + np.float32(1.0)
    if config.model_type not in ("llama", "mixtral"):
        return stored
    for part, heads in ((".q_proj.", config.num_attention_heads), (".k_proj.", config.num_key_value_heads)):
        if part in name:
            rows = stored.reshape(heads, 2, stored.shape[0] // heads // 2, *stored.shape[1:])
            return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(stored.shape)
    return stored


def _add_metadata(writer: GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_eos_token_id(2)
    _add_rope(writer, config)
    if experts := getattr(config, "num_local_experts", 0):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        rope = rope["full_attention"]
    else:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _llama3_factors(config: Any) -> np.ndarray:
    """The divisors that llama.cpp's converter writes for Llama 3.1's scaling."""
    rope = config.rope_parameters
    low, high, context = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for exponent in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (exponent / config.head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
