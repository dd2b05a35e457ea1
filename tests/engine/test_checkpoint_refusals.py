"""Damaged, lying and unsupported model files are refused by name, before anything is computed on them."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_writing import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stepping import Files, load
from tiny_models import TINY
from torch import Tensor

from penstock.core.errors import ModelError, ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.engine.checkpoint import GgufCheckpoint, SafetensorsCheckpoint, open_checkpoint
from penstock.engine.linear import PlainLinearBackend, QuantisedRows
from penstock.models.ggml_quants import GgmlType, dequantise_rows

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder, for a test to damage."""
    case = TINY["llama"]
    case.save(case.build(), tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    case = TINY["llama-tied-sharded"]
    case.save(case.build(), tmp_path)
    assert (tmp_path / INDEX).is_file() and not (tmp_path / SAFETENSORS).exists()
    return tmp_path


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / SAFETENSORS)
    edit(weights)
    save_file(weights, folder / SAFETENSORS)


def _refused(error: type[ModelError], folder: Path, *words: str) -> None:
    with pytest.raises(error) as caught:
        open_checkpoint(Files(folder))
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint


def test_a_header_that_lies_about_its_size(folder: Path) -> None:
    path = folder / SAFETENSORS
    content = path.read_bytes()
    for claimed in (1 << 62, 1 << 30, len(content), 0, 7):
        path.write_bytes(struct.pack("<Q", claimed) + content[8:])
        _refused(ModelFileDamaged, folder, SAFETENSORS)


def test_a_truncated_file(folder: Path) -> None:
    path = folder / SAFETENSORS
    content = path.read_bytes()
    for kept in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        _refused(ModelFileDamaged, folder, SAFETENSORS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 4000), value=st.integers(0, 255))
def test_any_changed_byte_of_the_header_is_read_or_refused(folder: Path, position: int, value: int) -> None:
    path = folder / SAFETENSORS
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[position] = value
    path.write_bytes(bytes(damaged))
    try:
        open_checkpoint(Files(folder))
    except ModelError as error:
        assert error.hint
    finally:
        path.write_bytes(sound)


def test_a_missing_tensor(folder: Path) -> None:
    _edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    _refused(ModelFileDamaged, folder, "`model.layers.1.mlp.up_proj.weight`", "missing")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    _edit_config(folder, intermediate_size=79)
    _refused(ModelFileDamaged, folder, "gate_proj.weight", "[80, 48]", "[79, 48]")


def test_a_tensor_of_another_type(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _edit_weights(folder, lambda weights: weights.update({name: weights[name].to(torch.int8)}))
    _refused(ModelUnsupported, folder, name, "I8")


def test_an_untied_head_that_is_not_there(folder: Path) -> None:
    _edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    _refused(ModelFileDamaged, folder, "`lm_head.weight`")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    _refused(ModelNotAvailable, sharded, shard.name)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x.bin", ""],
)
def test_an_index_that_points_out_of_the_folder(sharded: Path, name: str) -> None:
    path = sharded / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    _refused(ModelFileDamaged, sharded, INDEX, "weight_map")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "{", "[" * 100_000])
def test_a_malformed_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    _refused(ModelFileDamaged, sharded, INDEX)


def test_pickles_are_not_read(folder: Path, tmp_path: Path) -> None:
    """The pickle would leave a file behind if anything loaded it."""
    witness = tmp_path / "witness"
    (folder / SAFETENSORS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(witness)))
    _refused(ModelUnsupported, folder, "pickle", "pytorch_model.bin")
    assert not witness.exists()


class _Bomb:
    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._witness,))


def test_a_folder_without_weights_or_config(folder: Path) -> None:
    (folder / SAFETENSORS).unlink()
    _refused(ModelNotAvailable, folder, SAFETENSORS)
    _refused(ModelNotAvailable, folder / "nowhere", "cannot be read")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    _refused(ModelNotAvailable, folder, "config.json")


def test_a_gguf_that_lacks_a_tensor_or_has_another_shape(tmp_path: Path) -> None:
    case = TINY["qwen3"]
    path = tmp_path / "model.gguf"
    write_gguf(case.build(), path, GGMLQuantizationType.F32)
    content = path.read_bytes()
    assert content.count(b"blk.2.ffn_up.weight") == 1
    path.write_bytes(content.replace(b"blk.2.ffn_up.weight", b"blk.2.ffn_xx.weight"))
    with pytest.raises(ModelFileDamaged, match="`blk.2.ffn_up.weight` is missing"):
        GgufCheckpoint(path)
    key = b"qwen3.feed_forward_length" + struct.pack("<I", 4)
    assert content.count(key) == 1
    path.write_bytes(content.replace(key + struct.pack("<I", 80), key + struct.pack("<I", 81)))
    with pytest.raises(ModelFileDamaged, match=r"ffn_gate.weight` has shape \[80, 48\]"):
        GgufCheckpoint(path)


def test_weights_stored_in_the_model_dtype_are_views_of_the_file(folder: Path, tmp_path: Path) -> None:
    """No copy is made: asking twice gives the same memory."""
    name = "model.layers.0.mlp.down_proj.weight"
    checkpoint = SafetensorsCheckpoint(folder)
    assert checkpoint.take(name).data_ptr() == checkpoint.take(name, torch.float32).data_ptr()
    path = tmp_path / "model.gguf"
    write_gguf(TINY["qwen3"].build(), path, GGMLQuantizationType.F16)
    gguf = GgufCheckpoint(path)
    assert gguf.take(name).data_ptr() == gguf.take(name, torch.float16).data_ptr()


class _BlockBackend(PlainLinearBackend):
    """Takes Q4_1 as it stands, and counts."""

    def __init__(self) -> None:
        self.taken = 0

    def pack_quantised(self, weight: QuantisedRows, bias: Tensor | None) -> Any:
        if weight.ggml_type != GgmlType.Q4_1:
            return None
        self.taken += 1
        floats = dequantise_rows(weight.data.numpy(), weight.ggml_type, weight.columns)
        return self.pack(torch.from_numpy(floats), bias)


@pytest.mark.parametrize(("stored", "taken"), [("Q4_1", 3 * 4 + 1), ("Q8_0", 0)])
def test_a_backend_may_take_quantised_blocks(stored: str, taken: int, tmp_path: Path) -> None:
    """Fused, unpermuted and tied ones too; what it declines is dequantised for it."""
    case = TINY["llama-tied-sharded"]
    widths = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    path = tmp_path / "model.gguf"
    write_gguf(type(case)(case.config, case.changes | widths).build(), path, GGMLQuantizationType[stored])
    backend = _BlockBackend()
    packed, plain = load(Files(path, "gguf"), linear=backend), load(Files(path, "gguf"))
    assert backend.taken == taken
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed.logits(hidden), plain.logits(hidden))
    layer = range(0, 1)
    run = [model.run(layer, hidden, torch.arange(3), _Zero()) for model in (packed, plain)]
    assert torch.equal(run[0], run[1])


class _Zero:
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + k.repeat_interleave(2, dim=1) + v.repeat_interleave(2, dim=1)
