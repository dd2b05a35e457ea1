"""Dequantisation agrees bit for bit with the `gguf` package on random bytes, for every type."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from penstock.models.ggml_quants import LAYOUTS, GgmlType, dequantise_rows, row_byte_count

ROWS, COLUMNS = 37, 768


def random_bytes(ggml_type: GgmlType, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    shape = (rows, row_byte_count(ggml_type, columns))
    return np.random.default_rng(int(ggml_type)).integers(0, 256, shape, dtype=np.uint8)


def reference(raw: np.ndarray, ggml_type: GgmlType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType(int(ggml_type)))


@pytest.mark.parametrize("ggml_type", list(GgmlType), ids=lambda kind: kind.name)
def test_random_bytes_give_the_reference_bits(ggml_type: GgmlType) -> None:
    raw = random_bytes(ggml_type)
    ours, theirs = dequantise_rows(raw, ggml_type, COLUMNS), reference(raw, ggml_type)
    assert ours.dtype == np.float32 and ours.shape == (ROWS, COLUMNS)
    assert np.isfinite(ours).mean() > 0.9
    # A NaN's payload depends on which operand came first, so NaNs are compared by place only.
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    number = ~np.isnan(ours)
    assert np.array_equal(ours.view(np.uint32)[number], theirs.view(np.uint32)[number])


@pytest.mark.parametrize("ggml_type", list(GgmlType), ids=lambda kind: kind.name)
def test_block_sizes_are_those_of_the_format(ggml_type: GgmlType) -> None:
    layout = LAYOUTS[ggml_type]
    expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(ggml_type))]
    assert (layout.weights, layout.byte_count) == expected


def test_rows_are_the_same_in_one_pass_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_bytes(GgmlType.Q4_K)
    whole = dequantise_rows(raw, GgmlType.Q4_K, COLUMNS)
    monkeypatch.setattr("penstock.models.ggml_quants._WEIGHTS_PER_PASS", 5 * COLUMNS)
    assert np.array_equal(whole, dequantise_rows(raw, GgmlType.Q4_K, COLUMNS), equal_nan=True)


def test_a_read_only_source_gives_a_writable_copy() -> None:
    raw = np.zeros((2, 64), dtype=np.uint8)
    raw.setflags(write=False)
    out = dequantise_rows(raw, GgmlType.F32, 16)
    out[0, 0] = 1.0
    assert raw.sum() == 0


def test_a_row_of_the_wrong_width_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        dequantise_rows(np.zeros((1, 17), dtype=np.uint8), GgmlType.Q4_0, 32)
    with pytest.raises(AssertionError):
        row_byte_count(GgmlType.Q6_K, 100)
