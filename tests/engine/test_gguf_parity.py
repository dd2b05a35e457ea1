"""Models read from GGUF give the logits of transformers on the weights that the file holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Stored
from gguf.quants import dequantize
from gguf_writing import write_gguf
from stepping import Files, load, logits_in_chunks, random_tokens, relative_error
from tiny_models import TINY, VOCAB, Tiny

from penstock.engine.checkpoint import GgufCheckpoint

# Quantised rows come in blocks of 32, so widths are multiples of it here.
_WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
_CASES = {
    "llama-f32": ("llama", {}, Stored.F32),
    "llama-f16": ("llama", {}, Stored.F16),
    "llama-bf16": ("llama-tied-sharded", {}, Stored.BF16),
    "llama-q8_0": ("llama-tied-sharded", {}, Stored.Q8_0),
    "llama-q4_0": ("llama", {}, Stored.Q4_0),
    "llama-q4_1": ("llama", {}, Stored.Q4_1),
    "llama-biases": ("llama-biases", {}, Stored.F32),
    "llama-linear": ("llama-linear", {}, Stored.F32),
    "llama-llama3": ("llama-llama3", {}, Stored.F32),
    "qwen2-q8_0": ("qwen2", {}, Stored.Q8_0),
    "qwen2-yarn": ("qwen2-yarn", {}, Stored.F32),
    "qwen3-f16": ("qwen3", {}, Stored.F16),
    "gemma2-q4_0": ("gemma2", {"query_pre_attn_scalar": 16}, Stored.Q4_0),
    "gemma3-q8_0": ("gemma3", {"query_pre_attn_scalar": 16}, Stored.Q8_0),
    "mixtral-q8_0": ("mixtral", {}, Stored.Q8_0),
    "mixtral-f32": ("mixtral", {}, Stored.F32),
    "qwen3-moe-q4_0": ("qwen3-moe-norm", {"moe_intermediate_size": 32, "mlp_only_layers": []}, Stored.Q4_0),
}


def _case(name: str) -> tuple[Tiny, Stored]:
    base, changes, stored = _CASES[name]
    tiny = TINY[base]
    widths = {
        key: value for key, value in _WIDTHS.items() if key != "head_dim" or not base.startswith("qwen2")
    }
    return replace(tiny, changes=tiny.changes | widths | changes), stored


@pytest.mark.parametrize("name", _CASES)
def test_logits_agree_with_transformers(name: str, tmp_path: Path) -> None:
    tiny, stored = _case(name)
    reference = tiny.build()
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, stored)
    tokens = random_tokens(29, VOCAB)
    with torch.no_grad():
        expected = reference(tokens[None], use_cache=False).logits[0]
    model = load(Files(path, "gguf"))
    assert relative_error(logits_in_chunks(model, tokens, [10, 1, 18]), expected) < 1e-4
    assert model.config.parameter_count() == reference.num_parameters()
    assert model.config.eos_token_ids == {2}


@pytest.mark.parametrize("name", ["llama-q4_0", "qwen2-q8_0", "mixtral-q8_0"])
def test_quantised_rows_are_the_matrix_in_canonical_order(name: str, tmp_path: Path) -> None:
    tiny, stored = _case(name)
    path = tmp_path / "model.gguf"
    write_gguf(tiny.build(), path, stored)
    checkpoint = GgufCheckpoint(path)
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    modules += ["mlp.experts.2.up_proj"] if checkpoint.config.moe else ["mlp.up_proj"]
    for module in modules:
        name = f"model.layers.1.{module}.weight"
        rows = checkpoint.quantised(name)
        assert rows is not None and rows.ggml_type == int(stored)
        dequantised = torch.from_numpy(dequantize(rows.data.numpy(), stored))
        assert torch.equal(dequantised, checkpoint.take(name))
    assert checkpoint.quantised("model.norm.weight") is None
