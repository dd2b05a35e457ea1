"""Weights from disk, under canonical names (`models/architecture.py`), whatever the file format.

Both formats are memory-mapped: a tensor that is stored in a float type is handed out as a view of the map,
so loading never holds a second full copy. Nothing here executes what it reads; pickles are refused. All
tensors are checked for presence, shape and type when the checkpoint opens, before any is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.core.errors import ModelError, ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.engine.gguf_names import gguf_place, half_split_order
from penstock.engine.linear import QuantisedRows
from penstock.models.config import (
    ModelConfig,
    ModelFiles,
    folder_config,
    gguf_config,
    read_json_object,
    weight_shapes,
)
from penstock.models.ggml_quants import GgmlType, dequantise_rows
from penstock.models.gguf import GgufFile, GgufTensor
from penstock.models.source import PICKLE_SUFFIXES

ROPE_FACTORS: Final = "rope_freqs.weight"
"""Not in `weight_shapes`: divisors of the rotary frequencies, float32[head_dim / 2], in some GGUF files."""

_SINGLE_FILE: Final = "model.safetensors"
_INDEX_FILE: Final = "model.safetensors.index.json"
_INDEX_BYTES_MAX: Final = 64 << 20
_SHARDS_MAX: Final = 4096
_SAFETENSORS_DTYPES: Final = ("F32", "F16", "BF16")
_GGML_FLOATS: Final = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
}
_DEQUANTISED_AT_ONCE: Final = 1 << 18  # weights; 1 MiB as float32, which stays in the cache
_FETCH_AGAIN: Final = "Fetch the model again, complete."


class Checkpoint(Protocol):
    """The weights of one model, read-only."""

    @property
    def config(self) -> ModelConfig: ...

    def has(self, name: str) -> bool:
        """Whether `take` would find it. Always true for the names of `weight_shapes(config)`."""
        ...

    def take(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU, in `dtype` or else as stored (float32 where quantised).

        A view of the file where no conversion is needed, so it is not to be written to.
        """
        ...

    def quantised(self, name: str) -> QuantisedRows | None:
        """The matrix in its stored quantised form; None where it is stored as floats."""
        ...


def open_checkpoint(source: ModelFiles) -> Checkpoint:
    """Raises `ModelNotAvailable`, `ModelFileDamaged` or `ModelUnsupported`, naming file and tensor."""
    if source.kind == "gguf":
        return GgufCheckpoint(source.path)
    return SafetensorsCheckpoint(source.path)


class SafetensorsCheckpoint:
    """A folder with config.json and model.safetensors, or the shards that its index lists."""

    def __init__(self, folder: Path) -> None:
        paths = _safetensors_files(folder)
        self.config = folder_config(folder)
        # A handle of the library, which maps the file and has checked that its header fits the file.
        self._home: dict[str, Any] = {}
        for path in paths:
            handle = _open_safetensors(path)
            self._home |= dict.fromkeys(handle.keys(), handle)
        for name, shape in weight_shapes(self.config).items():
            self._check(name, shape, folder)

    def has(self, name: str) -> bool:
        return self._disk_name(name) in self._home

    def take(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        disk_name = self._disk_name(name)
        tensor: Tensor = self._home[disk_name].get_tensor(disk_name)
        return tensor if dtype is None else tensor.to(dtype)

    def quantised(self, name: str) -> QuantisedRows | None:
        return None

    def _check(self, name: str, shape: tuple[int, ...], folder: Path) -> None:
        disk_name = self._disk_name(name)
        if disk_name not in self._home:
            raise ModelFileDamaged(f"Tensor `{disk_name}` is missing in `{folder}`.", hint=_FETCH_AGAIN)
        header = self._home[disk_name].get_slice(disk_name)
        _check_shape(disk_name, tuple(header.get_shape()), shape)
        if header.get_dtype() not in _SAFETENSORS_DTYPES:
            raise ModelUnsupported(
                f"Tensor `{disk_name}` is stored as {header.get_dtype()}, which the engine does not read.",
                hint=f"Folders may hold {', '.join(_SAFETENSORS_DTYPES)}; for quantised weights use GGUF.",
            )

    def _disk_name(self, name: str) -> str:
        """Mixtral's folders have their own names for the experts; all others are canonical."""
        if self.config.architecture != "mixtral" or ".mlp." not in name:
            return name
        name = name.replace(".mlp.", ".block_sparse_moe.")
        for canonical, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            name = name.replace(canonical, theirs)
        return name


class GgufCheckpoint:
    """One GGUF file."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.config = gguf_config(self._file)
        self._shapes = weight_shapes(self.config)
        if ROPE_FACTORS in self._file.tensors:
            self._shapes[ROPE_FACTORS] = (self.config.head_dim // 2,)
        for name, shape in self._shapes.items():
            self._check(name, shape)
        # Private to us and copied on write, so that torch may view it; the pages are the file's.
        size_bytes = path.stat().st_size
        self._bytes = torch.from_file(str(path), shared=False, size=size_bytes, dtype=torch.uint8)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def take(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor, rows = self._rows(name)
        if tensor.ggml_type in _GGML_FLOATS:
            flat = _as_floats(rows, _GGML_FLOATS[tensor.ggml_type])
        else:
            flat = _dequantised(rows, tensor.ggml_type, tensor.columns, dtype or torch.float32)
        value = flat.view(self._shapes[name])
        order = half_split_order(self.config, name)
        value = value if order is None else value.index_select(0, order)
        return value if dtype is None else value.to(dtype)

    def quantised(self, name: str) -> QuantisedRows | None:
        tensor, rows = self._rows(name)
        if tensor.ggml_type in _GGML_FLOATS or len(self._shapes[name]) != 2:
            return None
        order = half_split_order(self.config, name)
        data = rows if order is None else rows.index_select(0, order)
        return QuantisedRows(data, tensor.ggml_type, tensor.columns)

    def _rows(self, name: str) -> tuple[GgufTensor, Tensor]:
        """The tensor that holds `name`, and its share of the file: uint8[rows, bytes per row], a view."""
        if name == ROPE_FACTORS:
            tensor, expert = self._file.tensors[name], None
        else:
            place = gguf_place(self.config, name)
            tensor, expert = self._file.tensors[place.name], place.expert
        data = self._bytes.narrow(0, tensor.offset, tensor.byte_count).view(tensor.rows, -1)
        if expert is None:
            return tensor, data
        rows = self._shapes[name][0]
        return tensor, data.narrow(0, expert * rows, rows)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        gguf_name = name
        if name != ROPE_FACTORS:
            place = gguf_place(self.config, name)
            gguf_name = place.name
            if place.expert is not None:
                assert self.config.moe is not None
                shape = (self.config.moe.experts, *shape)
        if gguf_name not in self._file.tensors:
            raise ModelFileDamaged(
                f"Tensor `{gguf_name}` is missing in `{self._file.path.name}`.", hint=_FETCH_AGAIN
            )
        _check_shape(gguf_name, self._file.tensors[gguf_name].shape, shape)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ModelFileDamaged(
            f"Tensor `{name}` has shape {list(found)}, but the configuration makes it {list(expected)}.",
            hint="The configuration and the weights are not of the same model; fetch both again.",
        )


def _as_floats(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as the floats they are: a view, unless an odd alignment in the file forbids it."""
    is_aligned = rows.storage_offset() % dtype.itemsize == 0
    return (rows if is_aligned else rows.clone()).view(dtype)


def _dequantised(rows: Tensor, ggml_type: GgmlType, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in `dtype`, through float32 a few rows at a time, so that it never exists twice."""
    out = torch.empty((rows.shape[0], columns), dtype=dtype)
    step = max(1, _DEQUANTISED_AT_ONCE // columns)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].numpy()
        out[start : start + step] = torch.from_numpy(dequantise_rows(part, ggml_type, columns))
    return out


def _safetensors_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE_FILE).is_file():
        return [folder / _SINGLE_FILE]
    if (folder / _INDEX_FILE).is_file():
        return [
            folder / name for name in _shard_names(read_json_object(folder / _INDEX_FILE, _INDEX_BYTES_MAX))
        ]
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelNotAvailable(
            f"The folder `{folder}` cannot be read: {reason}.", hint="Check the path and its permissions."
        ) from error
    if pickles := [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]:
        raise ModelUnsupported(
            f"`{folder}` holds its weights as pickle only (`{pickles[0]}`), which can run code when read.",
            hint="Take a safetensors or GGUF version of the model, or convert it in a sandbox.",
        )
    raise ModelNotAvailable(
        f"`{folder}` has neither `{_SINGLE_FILE}` nor `{_INDEX_FILE}`.", hint=_FETCH_AGAIN
    )


def _shard_names(index: Mapping[str, object]) -> list[str]:
    """The distinct files of the index. A name that is not a plain file name of that folder is refused."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileDamaged(f"`{_INDEX_FILE}`: `weight_map` is missing.", hint=_FETCH_AGAIN)
    names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    if len(names) > _SHARDS_MAX:
        raise ModelFileDamaged(f"`{_INDEX_FILE}`: `weight_map` names {len(names)} files.", hint=_FETCH_AGAIN)
    for name in names:
        is_plain = PurePosixPath(name).name == name and "\\" not in name and "\0" not in name
        if not is_plain or not name.endswith(".safetensors"):
            raise ModelFileDamaged(
                f"`{_INDEX_FILE}`: `weight_map` points to `{name[:80]}`, not to one of the folder's files.",
                hint="Do not trust this model; fetch it from its publisher.",
            )
    return names


def _open_safetensors(path: Path) -> Any:
    """The library's handle. It checks the header's length and that the offsets cover the file exactly."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise _safetensors_error(path, error) from error


def _safetensors_error(path: Path, error: Exception) -> ModelError:
    if not path.is_file():
        return ModelNotAvailable(f"`{path.name}` is missing in `{path.parent}`.", hint=_FETCH_AGAIN)
    return ModelFileDamaged(f"`{path}` is not a sound safetensors file: {error}.", hint=_FETCH_AGAIN)
