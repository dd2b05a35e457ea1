"""H100 kernels measured by somebody else: a second opinion on the profile, and the plain float8 product.

The points are of inference-sim (blis_h100_kernels.csv), the profile's own fits of aiconfigurator. Where the
two disagree, the difference says how far one laboratory's kernel times can be trusted as another's.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.fitting import Errors, errors
from penstock.twin.costs.hardware import HardwareProfile

Row = dict[str, str]
HEAD_DIM = 128


def gemm_shapes(rows: Sequence[Row]) -> list[tuple[int, int, int, float]]:
    """(m, n, k, seconds). The file names no type; times beyond bfloat16's peak show that it is float8."""
    picked = [row for row in rows if row["kind"] == "gemm"]
    return [(_whole(row["m"]), _whole(row["n"]), _whole(row["k"]), _seconds(row)) for row in picked]


def decode_error(rows: Sequence[Row], profile: HardwareProfile) -> Errors:
    """Of the profile's decode attention on the other source's points."""
    predicted, measured = [], []
    for row in rows:
        if row["kind"] != "mha_decode":
            continue
        heads, kv_heads = _heads(row["shape"])
        batch, context = _whole(row["batch_size"]), _whole(row["kv_len"])
        kv_bytes = 4.0 * kv_heads * HEAD_DIM * batch * context
        fit = profile.decode_attention
        predicted.append(fit.seconds(profile.bandwidth, heads, kv_heads, batch, kv_bytes))
        measured.append(_seconds(row))
    return errors(predicted, measured)


def prefill_error(rows: Sequence[Row], profile: HardwareProfile) -> Errors:
    """Of the profile's prefill attention on the other source's points, one prompt each."""
    predicted, measured = [], []
    for row in rows:
        if row["kind"] == "mha_prefill":
            heads, kv_heads = _heads(row["shape"])
            fit, flops = profile.prefill_attention, profile.flops("bfloat16")
            predicted.append(fit.seconds(flops, heads, kv_heads, HEAD_DIM, 1, _whole(row["seq_len"])))
            measured.append(_seconds(row))
    return errors(predicted, measured)


def _heads(shape: str) -> tuple[int, int]:
    """`32-8-128-tp2` or `32-8-128` → query and KV heads of one device."""
    heads, kv_heads, _, *cut = shape.split("-")
    devices = int(cut[0].removeprefix("tp")) if cut else 1
    return int(heads) // devices, max(1, int(kv_heads) // devices)


def _whole(text: str) -> int:
    return int(float(text))


def _seconds(row: Row) -> float:
    return float(row["latency_us"]) / 1e6
