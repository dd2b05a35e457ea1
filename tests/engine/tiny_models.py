"""Small random models of every architecture, made and saved by transformers.

Sizes are odd on purpose: head_dim differs from hidden / heads where an architecture allows it, groups of
query heads are uneven to the number of layers, and windows are shorter than the test prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500_000.0,
}
_LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0}
_MSCALE_YARN = _YARN | {
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 4.0,
    "truncate": False,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


@dataclass(frozen=True)
class Tiny:
    """One case: the transformers configuration class, what differs from `_SIZES`, and how to save it."""

    config: Callable[..., Any]
    changes: dict[str, Any]
    shard_size: str = "1GB"

    def build(self) -> Any:
        """A model in evaluation mode with weights large enough that every part moves the logits."""
        torch.manual_seed(7)
        config = self.config(**(_SIZES | self.changes), attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.25)
        return model

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=self.shard_size)


def _moe(**changes: Any) -> dict[str, Any]:
    return {"num_experts_per_tok": 3, "head_dim": 16, **changes}


TINY: dict[str, Tiny] = {
    "llama": Tiny(transformers.LlamaConfig, {}),
    "llama-tied-sharded": Tiny(transformers.LlamaConfig, {"tie_word_embeddings": True}, shard_size="40KB"),
    "llama-biases": Tiny(transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Tiny(transformers.LlamaConfig, {"rope_parameters": _LINEAR}),
    "llama-llama3": Tiny(transformers.LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama-yarn": Tiny(transformers.LlamaConfig, {"rope_parameters": _YARN}),
    "llama-yarn-mscale": Tiny(transformers.LlamaConfig, {"rope_parameters": _MSCALE_YARN, "head_dim": 32}),
    "mistral-window": Tiny(transformers.MistralConfig, {"sliding_window": 9, "head_dim": 16}),
    "mistral-full": Tiny(transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": Tiny(transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": Tiny(
        transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "qwen2-yarn": Tiny(transformers.Qwen2Config, {"rope_parameters": _YARN}),
    "qwen3": Tiny(transformers.Qwen3Config, {"head_dim": 16}),
    "qwen3-biases": Tiny(transformers.Qwen3Config, {"head_dim": 8, "attention_bias": True}),
    "gemma2": Tiny(
        transformers.Gemma2Config,
        {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": Tiny(
        transformers.Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 7, "num_hidden_layers": 7, "rope_parameters": _GEMMA3_ROPE},
    ),
    "gemma3-softcap": Tiny(
        transformers.Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 12.0},
    ),
    "mixtral": Tiny(transformers.MixtralConfig, _moe(num_local_experts=5), shard_size="60KB"),
    "mixtral-window": Tiny(
        transformers.MixtralConfig, {"num_local_experts": 4, "sliding_window": 8, "num_experts_per_tok": 2}
    ),
    "qwen3-moe-plain": Tiny(
        transformers.Qwen3MoeConfig, _moe(num_experts=6, moe_intermediate_size=24, norm_topk_prob=False)
    ),
    "qwen3-moe-norm": Tiny(
        transformers.Qwen3MoeConfig,
        _moe(num_experts=6, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1]),
    ),
}
