"""Loading holds the packed weights and one fused matrix, never a second copy of the model."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from gguf_writing import write_gguf
from stepping import Files, load
from torch import Tensor

from penstock.core.units import KIB, MIB
from penstock.engine.linear import PlainLinear, PlainLinearBackend

HIDDEN, FFN, LAYERS = 512, 2048, 8
FUSED_BYTES = 2 * FFN * HIDDEN * 2  # gate and up in bfloat16
SLACK_BYTES = 24 * MIB  # allocator, small tensors, the interpreter
WEIGHT_BYTES = 2 * (LAYERS * (4 * HIDDEN * HIDDEN + 3 * FFN * HIDDEN) + 2 * 1024 * HIDDEN)


class _WatchedBackend(PlainLinearBackend):
    """Notes the process's own memory at every matrix; pages of mapped files do not count to it."""

    def __init__(self) -> None:
        self.first_bytes = self.peak_bytes = _anonymous_bytes()

    def pack(self, weight: Tensor, bias: Tensor | None) -> PlainLinear:
        self.peak_bytes = max(self.peak_bytes, _anonymous_bytes())
        return super().pack(weight, bias)


def _give_back_free_memory() -> None:
    """Hand freed heap pages back to the system, so that what is allocated next is seen to arrive."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("the kernel does not report RssAnon")


def _save_folder(dtype: torch.dtype) -> Callable[[Any, Path], Files]:
    def save(model: Any, path: Path) -> Files:
        model.to(dtype).save_pretrained(path)
        return Files(path)

    return save


def _save_gguf(model: Any, path: Path) -> Files:
    write_gguf(model, path / "model.gguf", GGMLQuantizationType.Q8_0)
    return Files(path / "model.gguf", "gguf")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs /proc and malloc_trim")
@pytest.mark.parametrize(
    ("save", "copied_frac"),
    [
        # Stored as computed: only what is fused is copied, the rest stays in the file's pages.
        pytest.param(_save_folder(torch.bfloat16), 0.75, id="bfloat16"),
        pytest.param(_save_folder(torch.float32), 1.0, id="float32"),
        pytest.param(_save_gguf, 1.0, id="q8_0"),
    ],
)
def test_peak_memory(save: Callable[[Any, Path], Files], copied_frac: float, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    files = save(transformers.LlamaForCausalLM(config), tmp_path)
    _give_back_free_memory()
    watched = _WatchedBackend()
    model = load(files, torch.bfloat16, watched)
    assert abs(model.weight_bytes - WEIGHT_BYTES) < MIB
    grown_bytes = watched.peak_bytes - watched.first_bytes
    assert grown_bytes <= copied_frac * WEIGHT_BYTES + 2 * FUSED_BYTES + SLACK_BYTES
    if copied_frac == 1.0:
        assert grown_bytes > WEIGHT_BYTES / 2, "the weights were seen to arrive"
