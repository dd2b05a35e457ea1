"""A small random Llama written to a folder, and an engine on it; no network, no transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from penstock.engine.attention import AttentionBackend, TorchAttention, make_attention
from penstock.engine.checkpoint import open_checkpoint
from penstock.engine.executor import TorchExecutor
from penstock.engine.host_kv import HostKV
from penstock.engine.kv_store import KVStore
from penstock.engine.linear_cpu import CpuLinearBackend
from penstock.engine.model import DecoderModel
from penstock.engine.threads import Threads
from penstock.models.config import weight_shapes
from penstock.models.config_hf import from_hf

THREADS = Threads(2)  # steps of few rows on one thread, larger ones on two: both occur

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Source:
    kind: str
    path: Path


def write_tiny_llama(folder: Path, **changes: object) -> Source:
    """config.json and model.safetensors. Weights are large enough that greedy choices vary."""
    config = {**TINY, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.2
        for name, shape in weight_shapes(from_hf(config)).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return Source("folder", folder)


class TinyEngine:
    """Fresh executors on one loaded model; each has its own pages, filled with NaN to catch stray reads."""

    def __init__(self, source: Source, dtype: torch.dtype, attention: str) -> None:
        self.dtype, self.attention = dtype, attention
        self.model = DecoderModel.load(
            open_checkpoint(source), dtype=dtype, device=torch.device("cpu"), linear=CpuLinearBackend(THREADS)
        )

    def executor(
        self,
        kv_blocks: int,
        block_tokens: int = 16,
        host_blocks: int = 0,
        bytes_per_s: float | None = None,
    ) -> TorchExecutor:
        store = KVStore(self.model.config, kv_blocks, block_tokens, self.dtype, torch.device("cpu"))
        store.k.fill_(torch.nan)
        store.v.fill_(torch.nan)
        backend: AttentionBackend
        if self.attention == "torch":
            backend = TorchAttention(self.model.config, store)
        else:
            backend = make_attention(self.model.config, store)
            assert backend.name == self.attention, "the kernels were not built"
        host = HostKV(store, host_blocks, bytes_per_s) if host_blocks else None
        return TorchExecutor(self.model, store, backend, THREADS, host)
