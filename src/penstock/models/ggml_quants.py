"""Dequantising ggml tensor types to float32 in NumPy. Pure; no file is touched here.

A ggml row is a sequence of blocks. A block stores a fixed number of weights as small integers beside a
half-precision scale (and, in some types, a minimum). Each block layout below is written as a NumPy
structured type, field by field in file order, so that reading a tensor is one `view` and the arithmetic
names what it uses. Layouts are those of ggml's `ggml-common.h` (`block_q4_0` … `block_q6_K`), all
little-endian. Results are bit-identical to the reference implementation in the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Blocks = npt.NDArray[Any]
"""Structured array of blocks, shape (rows, blocks per row)."""


class GgmlType(IntEnum):
    """The tensor types we read; the numbers are those stored in a GGUF file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


class BlockLayout(NamedTuple):
    """How many weights one block holds, and its layout in the file."""

    weights: int
    dtype: np.dtype[Any]

    @property
    def byte_count(self) -> int:
        return self.dtype.itemsize


def _layout(weights: int, *fields: tuple[str, str] | tuple[str, str, int]) -> BlockLayout:
    return BlockLayout(weights, np.dtype(list(fields)))


LAYOUTS: Final[dict[GgmlType, BlockLayout]] = {
    GgmlType.F32: _layout(1, ("value", "<f4")),
    GgmlType.F16: _layout(1, ("value", "<f2")),
    GgmlType.BF16: _layout(1, ("value", "<u2")),
    GgmlType.Q4_0: _layout(32, ("scale", "<f2"), ("nibbles", "u1", 16)),
    GgmlType.Q4_1: _layout(32, ("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)),
    GgmlType.Q5_0: _layout(32, ("scale", "<f2"), ("fifth_bits", "u1", 4), ("nibbles", "u1", 16)),
    GgmlType.Q5_1: _layout(
        32, ("scale", "<f2"), ("minimum", "<f2"), ("fifth_bits", "u1", 4), ("nibbles", "u1", 16)
    ),
    GgmlType.Q8_0: _layout(32, ("scale", "<f2"), ("values", "i1", 32)),
    GgmlType.Q4_K: _layout(
        256, ("scale", "<f2"), ("minimum", "<f2"), ("sub_scales", "u1", 12), ("nibbles", "u1", 128)
    ),
    GgmlType.Q5_K: _layout(
        256,
        ("scale", "<f2"),
        ("minimum", "<f2"),
        ("sub_scales", "u1", 12),
        ("fifth_bits", "u1", 32),
        ("nibbles", "u1", 128),
    ),
    GgmlType.Q6_K: _layout(
        256, ("nibbles", "u1", 128), ("top_bits", "u1", 64), ("sub_scales", "i1", 16), ("scale", "<f2")
    ),
}

_WEIGHTS_PER_PASS: Final = 1 << 20
"""Rows are dequantised in groups of about this many weights, so temporaries stay a few MiB."""


def row_byte_count(ggml_type: GgmlType, columns: int) -> int:
    """Bytes of one row of `columns` weights. `columns` is a multiple of the type's block."""
    layout = LAYOUTS[ggml_type]
    assert columns % layout.weights == 0, f"{columns} columns do not fill blocks of {layout.weights}"
    return columns // layout.weights * layout.byte_count


def dequantise_rows(raw: Bytes, ggml_type: GgmlType, columns: int) -> Floats:
    """Rows of blocks → float32 weights.

    `raw`: uint8, shape (rows, row_byte_count(ggml_type, columns)); returns a new array (rows, columns).
    Pure. Scales that are infinite or NaN in the file come out as they are, without a warning.
    """
    assert raw.dtype == np.uint8 and raw.shape[1:] == (row_byte_count(ggml_type, columns),)
    rows = raw.shape[0]
    blocks = np.ascontiguousarray(raw).view(LAYOUTS[ggml_type].dtype)
    out = np.empty((rows, columns), dtype=np.float32)
    rows_per_pass = max(1, _WEIGHTS_PER_PASS // max(1, columns))
    with np.errstate(all="ignore"):
        for start in range(0, rows, rows_per_pass):
            part = slice(start, start + rows_per_pass)
            out[part] = _DEQUANTISERS[ggml_type](blocks[part]).reshape(-1, columns)
    return out


def _float(blocks: Blocks) -> Floats:
    """F32 and F16: the value itself."""
    return _f32(blocks["value"])


def _bf16(blocks: Blocks) -> Floats:
    """A bfloat16 is the upper half of a float32."""
    return (blocks["value"].astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(blocks: Blocks) -> Floats:
    return _scaled(blocks, _centred(_nibbles(blocks, 16), 8))


def _q4_1(blocks: Blocks) -> Floats:
    return _scaled(blocks, _nibbles(blocks, 16)) + _per_block(blocks["minimum"])


def _q5_0(blocks: Blocks) -> Floats:
    return _scaled(blocks, _centred(_five_bits(blocks), 16))


def _q5_1(blocks: Blocks) -> Floats:
    return _scaled(blocks, _five_bits(blocks)) + _per_block(blocks["minimum"])


def _q8_0(blocks: Blocks) -> Floats:
    return _scaled(blocks, blocks["values"])


def _q4_k(blocks: Blocks) -> Floats:
    """Eight sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum."""
    scales, minimums = _sub_scales(blocks)
    return scales * _f32(_nibbles(blocks, 32)) - minimums


def _q5_k(blocks: Blocks) -> Floats:
    """As Q4_K; bit `s` of byte `i` of `fifth_bits` belongs to weight `i` of sub-block `s`."""
    scales, minimums = _sub_scales(blocks)
    fifth = (blocks["fifth_bits"][..., None, :] >> _shifts(1, 8)) & np.uint8(1)
    return scales * _f32(_nibbles(blocks, 32) | fifth << np.uint8(4)) - minimums


def _q6_k(blocks: Blocks) -> Floats:
    """Sixteen sub-blocks of 16 with signed 8-bit scales; four low bits and two top bits per weight."""
    shape = blocks.shape
    low = _nibbles(blocks, 64).reshape(*shape, 2, 4, 32)
    top = (blocks["top_bits"].reshape(*shape, 2, 1, 32) >> _shifts(2, 4)) & np.uint8(3)
    weights = _centred(low | top << np.uint8(4), 32).reshape(*shape, 16, 16)
    scales = _per_block(blocks["scale"]) * _f32(blocks["sub_scales"])
    return scales[..., None] * _f32(weights)


_DEQUANTISERS: Final[dict[GgmlType, Callable[[Blocks], Floats]]] = {
    GgmlType.F32: _float,
    GgmlType.F16: _float,
    GgmlType.BF16: _bf16,
    GgmlType.Q4_0: _q4_0,
    GgmlType.Q4_1: _q4_1,
    GgmlType.Q5_0: _q5_0,
    GgmlType.Q5_1: _q5_1,
    GgmlType.Q8_0: _q8_0,
    GgmlType.Q4_K: _q4_k,
    GgmlType.Q5_K: _q5_k,
    GgmlType.Q6_K: _q6_k,
}


def _f32(values: npt.NDArray[Any]) -> Floats:
    return values.astype(np.float32)


def _per_block(halves: npt.NDArray[Any]) -> Floats:
    """One number per block, shaped to broadcast over the block's weights."""
    return _f32(halves)[..., None]


def _scaled(blocks: Blocks, weights: npt.NDArray[Any]) -> Floats:
    """`scale * weight` for blocks with a single scale; `weights` is flattened to (rows, blocks, 32)."""
    return _per_block(blocks["scale"]) * _f32(weights).reshape(*blocks.shape, -1)


def _centred(unsigned: Bytes, zero: int) -> npt.NDArray[np.int8]:
    """Unsigned codes whose zero point is `zero`, as signed integers."""
    return unsigned.astype(np.int8) - np.int8(zero)


def _shifts(bits: int, count: int) -> Bytes:
    """0, bits, 2·bits, … as a column that broadcasts over bytes: shape (count, 1)."""
    return (np.arange(count, dtype=np.uint8) * np.uint8(bits))[:, None]


def _nibbles(blocks: Blocks, width: int) -> Bytes:
    """4-bit codes in weight order, shape (…, groups, width).

    Bytes come in runs of `width`: the run's low nibbles are the first `width` weights, its high nibbles
    the next.
    """
    packed: Bytes = blocks["nibbles"]
    runs = packed.reshape(*blocks.shape, -1, 1, width)
    return ((runs >> _shifts(4, 2)) & np.uint8(15)).reshape(*blocks.shape, -1, width)


def _five_bits(blocks: Blocks) -> Bytes:
    """Nibbles with their fifth bit, which is bit `i` of a 32-bit word for weight `i`: shape (…, 2, 16)."""
    fifth = np.unpackbits(blocks["fifth_bits"], axis=-1, bitorder="little").reshape(*blocks.shape, 2, 16)
    return _nibbles(blocks, 16) | fifth << np.uint8(4)


def _sub_scales(blocks: Blocks) -> tuple[Floats, Floats]:
    """Scale and minimum of the eight sub-blocks of Q4_K and Q5_K, each of shape (…, 8, 1).

    Twelve bytes in three groups of four, A, B, C. Sub-blocks 0 to 3 have their 6-bit scale in A and their
    minimum in B; sub-blocks 4 to 7 have four low bits in C (scale low, minimum high nibble) and two top
    bits in the upper bits of A and B.
    """
    packed = blocks["sub_scales"].reshape(*blocks.shape, 3, 4)
    a, b, c = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
    scales = np.concatenate([a & 0x3F, (c & 0x0F) | (a >> 2) & 0x30], axis=-1)
    minimums = np.concatenate([b & 0x3F, (c >> 4) | (b >> 2) & 0x30], axis=-1)
    return (
        (_per_block(blocks["scale"]) * _f32(scales))[..., None],
        (_per_block(blocks["minimum"]) * _f32(minimums))[..., None],
    )
