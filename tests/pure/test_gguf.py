"""The GGUF reader against files written by the `gguf` package, and against lying ones built byte by byte."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from penstock.core.errors import ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.models.ggml_quants import GgmlType, row_byte_count
from penstock.models.gguf import MAX_STRING_BYTES, GgufFile

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    shape = struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", size) for size in dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def file_bytes(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    tensor_count: int | None = None,
    metadata_count: int | None = None,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if metadata_count is None else metadata_count,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write_file


def test_every_value_type_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, tuple[gguf.GGUFValueType, Any]] = {
        "t.u8": (gguf.GGUFValueType.UINT8, 255),
        "t.i8": (gguf.GGUFValueType.INT8, -128),
        "t.u16": (gguf.GGUFValueType.UINT16, 65535),
        "t.i16": (gguf.GGUFValueType.INT16, -32768),
        "t.u32": (gguf.GGUFValueType.UINT32, 2**32 - 1),
        "t.i32": (gguf.GGUFValueType.INT32, -(2**31)),
        "t.u64": (gguf.GGUFValueType.UINT64, 2**64 - 1),
        "t.i64": (gguf.GGUFValueType.INT64, -(2**63)),
        "t.f32": (gguf.GGUFValueType.FLOAT32, 0.5),
        "t.f64": (gguf.GGUFValueType.FLOAT64, 0.1),
        "t.bool": (gguf.GGUFValueType.BOOL, True),
        "t.text": (gguf.GGUFValueType.STRING, "zwölf ☃"),
    }
    for key, (kind, value) in values.items():
        writer.add_key_value(key, value, kind)
    writer.add_array("t.texts", ["a", "", "ü"])
    writer.add_array("t.numbers", [1, -2, 3])
    writer.add_array("t.flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GgufFile(path).metadata
    assert {key: metadata[key] for key in values} == {key: value for key, (_, value) in values.items()}
    assert metadata["t.bool"] is True
    assert metadata["t.texts"] == ["a", "", "ü"]
    assert metadata["t.numbers"] == [1, -2, 3]
    assert metadata["t.flags"] == [True, False]


def test_tensors_are_placed_and_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    matrix = random.standard_normal((3, 64), dtype=np.float32)
    experts = random.standard_normal((2, 3, 32), dtype=np.float32)
    writer.add_tensor("norm", np.arange(7, dtype=np.float32))
    quantised = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("matrix", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("experts", experts.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GgufFile(path)
    assert [(t.name, t.shape, t.ggml_type) for t in model.tensors.values()] == [
        ("norm", (7,), GgmlType.F32),
        ("matrix", (3, 64), GgmlType.Q8_0),
        ("experts", (2, 3, 32), GgmlType.F16),
    ]
    assert np.array_equal(model.dequantise("norm"), np.arange(7))
    assert model.raw("matrix").shape == (3, row_byte_count(GgmlType.Q8_0, 64))
    assert np.array_equal(model.raw("matrix"), quantised)
    assert np.array_equal(
        model.dequantise("matrix"), gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
    )
    assert np.array_equal(model.dequantise("experts"), experts.astype(np.float16).astype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        model.raw("matrix")[0, 0] = 1


FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)
ALIGNED = FOUR_FLOATS + b"\0" * 16

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "wrong magic": (b"GGML" + bytes(60), "magic"),
    "three bytes": (b"GGU", "magic"),
    "ends in the version": (b"GGUF\3\0", "version"),
    "ends in the counts": (b"GGUF" + struct.pack("<IQ", 3, 0), "metadata count"),
    "2^63 tensors": (file_bytes(tensor_count=2**63), "tensor count"),
    "2^63 entries": (file_bytes(metadata_count=2**63), "metadata count"),
    "entries that are not there": (file_bytes(metadata_count=9), "needs 4 bytes"),
    "tensors that are not there": (file_bytes(tensor_count=9), "tensor"),
    "string of 2^64 - 1 bytes": (
        file_bytes([entry("k", STRING, struct.pack("<Q", 2**64 - 1))]),
        "`k` has a string",
    ),
    "string past the end": (file_bytes([entry("k", STRING, struct.pack("<Q", 4000))]), "`k` needs 4000"),
    "string over the limit": (
        file_bytes([entry("k", STRING, struct.pack("<Q", MAX_STRING_BYTES + 1))]),
        "more than we accept",
    ),
    "not UTF-8": (file_bytes([entry("k", STRING, text(b"\xff\xfe"))]), "`k` is not valid UTF-8"),
    "unknown value type": (file_bytes([entry("k", 99, bytes(8))]), "unknown value type 99"),
    "array of 2^64 - 1 bytes": (
        file_bytes([entry("k", ARRAY, struct.pack("<IQ", 0, 2**64 - 1))]),
        "`k` claims an array",
    ),
    "array of strings that cannot fit": (
        file_bytes([entry("k", ARRAY, struct.pack("<IQ", STRING, 1000))], data=bytes(1000)),
        "`k` claims an array",
    ),
    "unknown element type": (file_bytes([entry("k", ARRAY, struct.pack("<IQ", 77, 1))]), "element type 77"),
    "arrays in arrays without end": (
        file_bytes([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 1000)]),
        "nests arrays",
    ),
    "truth value of 2": (file_bytes([entry("k", 7, b"\2")]), "truth value"),
    "key twice": (file_bytes([entry("k", 0, b"\0")] * 2), "`k` appears twice"),
    "long key": (file_bytes([entry("k" * 2000, 0, b"\0")]), "metadata key 0"),
    "alignment of 3": (
        file_bytes([entry("general.alignment", U32, struct.pack("<I", 3))]),
        "general.alignment",
    ),
    "alignment of 0": (
        file_bytes([entry("general.alignment", U32, struct.pack("<I", 0))]),
        "general.alignment",
    ),
    "alignment as text": (file_bytes([entry("general.alignment", STRING, text("32"))]), "general.alignment"),
    "tensor twice": (file_bytes(tensors=[tensor("w", [4], 0, 0)] * 2, data=ALIGNED), "`tensor w` appears"),
    "no dimensions": (file_bytes(tensors=[tensor("w", [], 0, 0)]), "has 0 dimensions"),
    "a million dimensions": (
        file_bytes(tensors=[text("w") + struct.pack("<I", 1_000_000)]),
        "has 1000000 dimensions",
    ),
    "a dimension of 0": (file_bytes(tensors=[tensor("w", [4, 0], 0, 0)]), "dimension of 0"),
    "dimensions whose product wraps": (
        file_bytes(tensors=[tensor("w", [2**32, 2**32, 2], 0, 0)], data=ALIGNED),
        "`tensor w` ends",
    ),
    "rows that break a block": (
        file_bytes(tensors=[tensor("w", [33], 2, 0)], data=bytes(64)),
        "not a multiple of Q4_0",
    ),
    "offset past the end": (
        file_bytes(tensors=[tensor("w", [4], 0, 2**63)], data=ALIGNED),
        "`tensor w` ends",
    ),
    "offset not aligned": (file_bytes(tensors=[tensor("w", [4], 0, 4)], data=bytes(64)), "multiple of 32"),
    "tensors that overlap": (
        file_bytes(tensors=[tensor("v", [16], 0, 0), tensor("w", [4], 0, 32)], data=bytes(64)),
        "`tensor w` overlaps",
    ),
    "data cut short": (file_bytes(tensors=[tensor("w", [16], 0, 0)], data=bytes(63)), "`tensor w` ends"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_with_its_field(case: str, write: Callable[[bytes], Path]) -> None:
    content, field = DAMAGED[case]
    path = write(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileDamaged) as caught:
            GgufFile(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert field in caught.value.message and str(path) in caught.value.message
    assert caught.value.hint
    assert peak_bytes < 1 << 20


def test_a_sound_file_passes_the_same_checks(write: Callable[[bytes], Path]) -> None:
    content = file_bytes(
        [entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", 0, 2) + b"\1\2")],
        [tensor("v", [8], 0, 0), tensor("w", [2, 2], 0, 32)],
        bytes(32) + FOUR_FLOATS,
    )
    model = GgufFile(write(content))
    assert model.metadata == {"k": [[1, 2]]}
    assert model.dequantise("w").tolist() == [[1, 2], [3, 4]]


def test_every_prefix_of_a_file_is_refused(write: Callable[[bytes], Path]) -> None:
    entries = [entry("some.key", STRING, text("some value"))]
    whole = file_bytes(entries, [tensor("w", [4], 0, 0)], FOUR_FLOATS)
    for kept in range(len(whole)):
        with pytest.raises(ModelFileDamaged):
            GgufFile(write(whole[:kept]))
    assert "w" in GgufFile(write(whole)).tensors


UNSUPPORTED: dict[str, tuple[bytes, list[str]]] = {
    "version 1": (file_bytes(version=1), ["version 1"]),
    "version 9": (file_bytes(version=9), ["version 9"]),
    "big-endian": (file_bytes(version=3 << 24), ["big-endian"]),
    "known type": (
        file_bytes(tensors=[tensor("blk.0.w", [256], 10, 0)], data=bytes(84)),
        ["blk.0.w", "Q2_K"],
    ),
    "unknown type": (file_bytes(tensors=[tensor("w", [256], 4711, 0)]), ["`w`", "4711"]),
    "one part of many": (file_bytes([entry("split.count", 2, struct.pack("<H", 3))]), ["3 parts"]),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_we_do_not_read_is_named(case: str, write: Callable[[bytes], Path]) -> None:
    content, words = UNSUPPORTED[case]
    with pytest.raises(ModelUnsupported) as caught:
        GgufFile(write(content))
    assert all(word in caught.value.message for word in words)


def test_many_small_lists_and_strings_share_one_limit(
    write: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry alone is small; together they are what a lying file would fill the memory with."""
    lists = [entry(f"k{i}", ARRAY, struct.pack("<IQ", 0, 10) + bytes(10)) for i in range(4)]
    strings = [entry(f"k{i}", STRING, text("0123456789")) for i in range(4)]
    of_strings = write(file_bytes(strings)).rename(tmp_path / "strings.gguf")
    of_lists = write(file_bytes(lists))
    assert len(GgufFile(of_lists).metadata) == len(GgufFile(of_strings).metadata) == 4
    monkeypatch.setattr("penstock.models.gguf.MAX_ARRAY_ELEMENTS", 39)
    with pytest.raises(ModelFileDamaged, match="`k3` claims an array of 10"):
        GgufFile(of_lists)
    monkeypatch.setattr("penstock.models.gguf.MAX_ALL_STRINGS_BYTES", 4 * len("k0") + 39)
    with pytest.raises(ModelFileDamaged, match="`k3` has a string of 10 bytes"):
        GgufFile(of_strings)


def test_terminal_escapes_in_names_are_shown_harmlessly(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(ModelFileDamaged) as caught:
        GgufFile(write(file_bytes(tensors=[tensor("\x1b[2Jw", [4, 0], 0, 0)])))
    assert "\x1b" not in caught.value.message and "\\u001b[2Jw" in caught.value.message


def test_a_missing_file_and_a_folder_are_not_available(tmp_path: Path) -> None:
    with pytest.raises(ModelNotAvailable, match="No such file"):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotAvailable, match="cannot be opened"):
        GgufFile(tmp_path)
