"""Reading GGUF files, which are untrusted: every count, length and offset is checked before it is used.

Layout of a file (GGUF specification, versions 2 and 3, little-endian):

    magic "GGUF" │ version u32 │ tensor count u64 │ metadata count u64
    metadata:  key string │ value type u32 │ value            (repeated)
    tensors:   name string │ dimension count u32 │ dimensions u64… │ type u32 │ offset u64    (repeated)
    padding to `general.alignment`
    tensor data; each tensor's offset counts from here

The file is memory-mapped; only the header is read, and no allocation is larger than what the bytes
present in the file can justify (limits below). We parse it ourselves because the `gguf` package trusts
the counts it reads: one lying array length makes it loop or allocate without bound.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt

from penstock.core.errors import ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.models.ggml_quants import LAYOUTS, GgmlType, dequantise_rows, row_byte_count

MetadataValue = bool | int | float | str | list["MetadataValue"]

MAGIC: Final = b"GGUF"
SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

# Generous multiples of the largest published models (262k tokens, 600k merges, 2k tensors).
MAX_METADATA_ENTRIES: Final = 65_536
MAX_TENSORS: Final = 65_536
MAX_ARRAY_ELEMENTS: Final = 4_194_304
"""Over all arrays of a file."""
MAX_STRING_BYTES: Final = 4 << 20
MAX_ALL_STRINGS_BYTES: Final = 64 << 20
MAX_NAME_BYTES: Final = 1024
MAX_ARRAY_DEPTH: Final = 4
MAX_DIMENSIONS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Final[dict[int, np.dtype[np.generic]]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_LEAST_BYTES: Final = {**{kind: dtype.itemsize for kind, dtype in _SCALARS.items()}, _STRING: 8, _ARRAY: 12}
"""The smallest encoding of one value of each type: an array cannot hold more than the file has room for."""

_UNREAD_TYPES: Final[dict[int, str]] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
"""ggml types (`enum ggml_type`) that exist and that we do not read, for the error message."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file.

    `shape` is in NumPy order: rows (outputs) first, columns (inputs) last.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GgmlType
    offset: int
    """Bytes from the start of the file."""
    byte_count: int

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GgufFile:
    """A parsed GGUF header over a read-only memory map of the file.

    Raises `ModelNotAvailable` if the file cannot be opened, `ModelFileDamaged` naming the file and the
    field if it is malformed, `ModelUnsupported` for a version, byte order, tensor type or split file that
    we do not read. The caller must not let the file be truncated while this object lives: the system then
    kills any reader of the map.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        cursor = _Cursor(path, self._bytes)
        tensor_count, metadata_count = _read_preamble(cursor)
        self.metadata: dict[str, MetadataValue] = _read_metadata(cursor, metadata_count)
        _refuse_split(path, self.metadata)
        self.alignment = _alignment(cursor, self.metadata)
        entries = _read_tensor_entries(cursor, tensor_count)
        data_start = _round_up(cursor.position, self.alignment)
        self.tensors: dict[str, GgufTensor] = _place_tensors(cursor, entries, data_start, self.alignment)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored: a read-only view of the map, shape (rows, bytes per row). No copy."""
        tensor = self.tensors[name]
        data = self._bytes[tensor.offset : tensor.offset + tensor.byte_count]
        return data.reshape(tensor.rows, row_byte_count(tensor.ggml_type, tensor.columns))

    def dequantise(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as a new float32 array of its `shape`."""
        tensor = self.tensors[name]
        return dequantise_rows(self.raw(name), tensor.ggml_type, tensor.columns).reshape(tensor.shape)


def _map(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:
            raise ModelFileDamaged(f"`{path}` is empty.", hint="Fetch the file again.")
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelNotAvailable(
            f"`{path}` cannot be opened: {reason}.", hint="Check the path and its permissions."
        ) from error


class _Cursor:
    """Reads the header from front to back. Never reads past the end and never trusts a length.

    `field` names what is being read, for the error message.
    """

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self.size = len(data)
        self.position = 0
        self.field = "magic"
        self._data = data.data
        self._array_elements_left = MAX_ARRAY_ELEMENTS
        self._string_bytes_left = MAX_ALL_STRINGS_BYTES

    def damaged(self, what: str) -> NoReturn:
        raise ModelFileDamaged(
            f"`{self.path}` is not a valid GGUF file: `{self.field}` {what} (at byte {self.position}).",
            hint="The file is truncated or corrupt; fetch it again and compare its checksum.",
        )

    def take(self, count: int) -> memoryview:
        if count > self.size - self.position:
            self.damaged(f"needs {count} bytes, but only {self.size - self.position} are left")
        start = self.position
        self.position += count
        return self._data[start : self.position]

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def count(self, limit: int) -> int:
        value = self.u64()
        if value > limit:
            self.damaged(f"is {value}, more than the {limit} we accept")
        return value

    def string(self, max_bytes: int = MAX_STRING_BYTES) -> str:
        length = self.u64()
        if length > min(max_bytes, self._string_bytes_left):
            self.damaged(f"has a string of {length} bytes, more than we accept")
        self._string_bytes_left -= length
        raw = self.take(length)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            self.damaged(f"is not valid UTF-8 ({error.reason})")

    def value(self, kind: int, depth: int = 0) -> MetadataValue:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        if kind in _SCALARS:
            return self._scalars(kind, 1)[0]
        self.damaged(f"has the unknown value type {kind}")

    def _array(self, depth: int) -> list[MetadataValue]:
        if depth > MAX_ARRAY_DEPTH:
            self.damaged(f"nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind, length = self.u32(), self.u64()
        if kind not in _LEAST_BYTES:
            self.damaged(f"has the unknown element type {kind}")
        fits = (self.size - self.position) // _LEAST_BYTES[kind]
        if length > min(fits, self._array_elements_left):
            self.damaged(f"claims an array of {length} elements")
        self._array_elements_left -= length
        if kind in _SCALARS:
            return self._scalars(kind, length)
        return [self.value(kind, depth) for _ in range(length)]

    def _scalars(self, kind: int, length: int) -> list[MetadataValue]:
        dtype = _SCALARS[kind]
        numbers = np.frombuffer(self.take(length * dtype.itemsize), dtype=dtype)
        if kind != _BOOL:
            return list(numbers.tolist())
        if bool((numbers > 1).any()):
            self.damaged("has a truth value other than 0 and 1")
        return list((numbers == 1).tolist())


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Returns (tensor count, metadata count)."""
    if cursor.size < len(MAGIC) or bytes(cursor.take(len(MAGIC))) != MAGIC:
        cursor.damaged("is not `GGUF`")
    cursor.field = "version"
    version = cursor.u32()
    if version not in SUPPORTED_VERSIONS:
        _refuse_version(cursor, version)
    cursor.field = "tensor count"
    tensor_count = cursor.count(MAX_TENSORS)
    cursor.field = "metadata count"
    return tensor_count, cursor.count(MAX_METADATA_ENTRIES)


def _refuse_version(cursor: _Cursor, version: int) -> NoReturn:
    # A small number in the upper half means that the bytes are in the other order.
    big_endian = version & 0xFFFF == 0 and version != 0
    what = "is big-endian" if big_endian else f"has GGUF version {version}"
    raise ModelUnsupported(
        f"`{cursor.path}` {what}; only little-endian versions 2 and 3 are read.",
        hint="Convert the model again with a current converter.",
    )


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(count):
        cursor.field = f"metadata key {index}"
        key = cursor.string(MAX_NAME_BYTES)
        cursor.field = _printable(key)
        if key in metadata:
            cursor.damaged("appears twice")
        metadata[key] = cursor.value(cursor.u32())
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    cursor.field = "general.alignment"
    is_power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
    if not is_power_of_two or not isinstance(value, int) or value > MAX_ALIGNMENT:
        cursor.damaged("is not a power of two within reason")
    return value


def _refuse_split(path: Path, metadata: dict[str, MetadataValue]) -> None:
    split_count = metadata.get("split.count", 1)
    if isinstance(split_count, int) and split_count > 1:
        raise ModelUnsupported(
            f"`{path}` is one of {split_count} parts of a split GGUF model.",
            hint="Merge the parts first, for example with `llama-gguf-split --merge`.",
        )


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    """A row of the tensor table. `offset` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GgmlType
    offset: int


def _read_tensor_entries(cursor: _Cursor, count: int) -> list[_TensorEntry]:
    entries: list[_TensorEntry] = []
    names: set[str] = set()
    for index in range(count):
        cursor.field = f"tensor name {index}"
        name = cursor.string(MAX_NAME_BYTES)
        cursor.field = f"tensor {_printable(name)}"
        if name in names:
            cursor.damaged("appears twice")
        names.add(name)
        entries.append(_read_tensor_entry(cursor, name))
    return entries


def _read_tensor_entry(cursor: _Cursor, name: str) -> _TensorEntry:
    dimension_count = cursor.u32()
    if not 1 <= dimension_count <= MAX_DIMENSIONS:
        cursor.damaged(f"has {dimension_count} dimensions")
    innermost_first = [cursor.u64() for _ in range(dimension_count)]
    if min(innermost_first) < 1:
        cursor.damaged("has a dimension of 0")
    ggml_type = _known_type(cursor, name, cursor.u32())
    block = LAYOUTS[ggml_type].weights
    if innermost_first[0] % block:
        cursor.damaged(
            f"has rows of {innermost_first[0]}, not a multiple of {ggml_type.name}'s block of {block}"
        )
    return _TensorEntry(name, tuple(reversed(innermost_first)), ggml_type, cursor.u64())


def _known_type(cursor: _Cursor, name: str, number: int) -> GgmlType:
    try:
        return GgmlType(number)
    except ValueError:
        label = _UNREAD_TYPES.get(number, f"number {number}")
        readable = ", ".join(kind.name for kind in GgmlType)
        raise ModelUnsupported(
            f"Tensor `{_printable(name)}` of `{cursor.path}` has the ggml type {label}, which is not read.",
            hint=f"Use a file with tensors of these types only: {readable}.",
        ) from None


def _place_tensors(
    cursor: _Cursor, entries: list[_TensorEntry], data_start: int, alignment: int
) -> dict[str, GgufTensor]:
    """Checks that every tensor lies inside the file, aligned, and overlaps no other."""
    tensors: dict[str, GgufTensor] = {}
    free_from = data_start
    for entry in sorted(entries, key=lambda entry: entry.offset):
        cursor.field = f"tensor {_printable(entry.name)}"
        offset = data_start + entry.offset
        row_bytes = row_byte_count(entry.ggml_type, entry.shape[-1])
        byte_count = math.prod(entry.shape[:-1]) * row_bytes
        if entry.offset % alignment:
            cursor.damaged(f"has an offset that is not a multiple of {alignment}")
        if offset + byte_count > cursor.size:
            cursor.damaged(f"ends at byte {offset + byte_count}, but the file has {cursor.size}")
        if offset < free_from:
            cursor.damaged("overlaps another tensor")
        free_from = offset + byte_count
        tensors[entry.name] = GgufTensor(entry.name, entry.shape, entry.ggml_type, offset, byte_count)
    return {entry.name: tensors[entry.name] for entry in entries}


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def _printable(name: str) -> str:
    """A name from the file, safe to show in a terminal: control characters escaped, length bounded."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name[:80])
