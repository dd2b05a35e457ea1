"""Fit the operators of the GPU profiles to published measurements, and write them with their errors.

    python -m benchmarks.fit_profiles ../shared/data/hardware

Half of the points is fitted, the other half is predicted; the halves interleave like the colours of a chess
board over the grid of shapes (for matrix products over outputs x inputs, so that held-out shapes are unseen
at every number of rows). Writes src/penstock/twin/profiles/*.toml and the section `twin-operators` of
RESULTS.md. Only numbers are read.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fitting import Errors, Parameter, errors, fit
from benchmarks.gpu_facts import ASSUMED, ENGINES, GPUS, Gpu
from benchmarks.results import write_section
from penstock.twin.costs.hardware import PROFILES
from penstock.twin.costs.operators import (
    CollectiveFit,
    DecodeAttentionFit,
    Device,
    FitError,
    GemmFit,
    PointwiseFit,
    PrefillAttentionFit,
)
from penstock.twin.costs.profile_file import SCHEMA_VERSION, toml_text

UNKNOWN = FitError(0.0, 0.0, 0)
Row = dict[str, str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """One measurement: its shape, its seconds, and the half it belongs to."""

    shape: Shape
    seconds: float
    fitted: bool


@dataclass(frozen=True)
class Outcome:
    """A fit, as the values of its section, and its errors on the other half."""

    values: dict[str, float]
    error: Errors


def rows_of(folder: Path, name: str) -> list[Row]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def solve(
    points: Sequence[Point],
    parameters: Sequence[Parameter],
    cost: Callable[[dict[str, float], Shape], float],
) -> Outcome:
    """Fit one half, and measure the error on the other."""
    fitted = [point for point in points if point.fitted]
    values = fit(
        parameters,
        lambda values: [cost(values, point.shape) for point in fitted],
        [point.seconds for point in fitted],
    )
    others = [point for point in points if not point.fitted]
    predicted = [cost(values, point.shape) for point in others]
    return Outcome(values, errors(predicted, [point.seconds for point in others]))


def ranks(values: Sequence[int]) -> dict[int, int]:
    return {value: index for index, value in enumerate(sorted(set(values)))}


def gemm_points(rows: list[Row], gpu: Gpu, dtype: str) -> list[Point]:
    picked = [row for row in rows if row["system"] == gpu.aic_name and row["gemm_dtype"] == dtype]
    n_rank, k_rank = ranks([int(row["n"]) for row in picked]), ranks([int(row["k"]) for row in picked])
    value_bytes = 1 if dtype == "fp8" else 2
    points = []
    for row in picked:
        m, n, k = int(row["m"]), int(row["n"]), int(row["k"])
        if n * k * value_bytes < gpu.cache_bytes:
            continue  # measured out of the cache, where an engine's weights never are
        points.append(Point((m, n, k), float(row["ms"]) / 1e3, (n_rank[n] + k_rank[k]) % 2 == 0))
    return points


def fit_gemm(points: list[Point], gpu: Gpu, dtype: str) -> Outcome:
    value_bytes = 1.0 if dtype == "float8" else 2.0
    device = Device(gpu.peaks[dtype], gpu.bandwidth, gpu.units)
    rows_max = max(point.shape[0] for point in points)

    def cost(values: dict[str, float], shape: Shape) -> float:
        kernel = GemmFit(**values, rows_max=rows_max, error=UNKNOWN)
        return kernel.seconds(device, *shape, value_bytes, value_bytes)

    parameters = [
        Parameter("launch_s", 4e-6, 1.5e-6, 3e-5),
        Parameter("compute_eff", 0.8, 0.2, 1.0),
        Parameter("memory_eff", 0.85, 0.3, 1.0),
        Parameter("sharpness", 3.0, 1.3, 12.0),
        Parameter("wave_waste", 0.2, 0.005, 1.0),
        Parameter("input_passes", 0.5, 0.01, 60.0),
    ]
    return solve(points, parameters, cost)


def decode_points(rows: list[Row], gpu: Gpu) -> list[Point]:
    picked = [row for row in rows if row["system"] == gpu.aic_name]
    contexts = [int(row["isl"]) + int(row["step"]) for row in picked]
    c_rank, b_rank = ranks(contexts), ranks([int(row["batch_size"]) for row in picked])
    points = []
    for row, context in zip(picked, contexts, strict=True):
        heads, kv_heads, batch = (int(row[key]) for key in ("num_heads", "num_key_value_heads", "batch_size"))
        kv_bytes = 4 * kv_heads * 128 * batch * context
        if gpu.cache_bytes and gpu.cache_bytes / 32 < kv_bytes < gpu.cache_bytes:
            continue
        fitted = (c_rank[context] + b_rank[batch]) % 2 == 0
        shape = (heads, kv_heads, batch, context)
        points.append(Point(shape, float(row["latency"]) / 1e3, fitted))
    return points


def fit_decode(points: list[Point], gpu: Gpu) -> Outcome:
    limits = {
        "sequences_max": max(point.shape[2] for point in points),
        "context_max": max(point.shape[3] for point in points),
    }

    def cost(values: dict[str, float], shape: Shape) -> float:
        heads, kv_heads, batch, context = shape
        kernel = DecodeAttentionFit(**values, **limits, error=UNKNOWN)
        return kernel.seconds(gpu.bandwidth, heads, kv_heads, batch, 4.0 * kv_heads * 128 * batch * context)

    parameters = [
        Parameter("launch_s", 1.1e-5, 2e-6, 5e-5),
        Parameter("kv_head_s", 2.5e-8, 1e-10, 1e-6),
        Parameter("head_s", 5e-10, 1e-12, 1e-7),
        Parameter("memory_eff", 0.9, 0.3, 1.0),
        Parameter("stream_bytes_per_s", 8e10, 1e10, 1e12),
        Parameter("splits", 12.0, 1.0, 64.0),
    ]
    return solve(points, parameters, cost)


def prefill_points(rows: list[Row], gpu: Gpu) -> list[Point]:
    picked = [row for row in rows if row["system"] == gpu.aic_name]
    lengths, batches = (
        ranks([int(row["isl"]) for row in picked]),
        ranks([int(row["batch_size"]) for row in picked]),
    )
    points = []
    for row in picked:
        heads, kv_heads, batch = (int(row[key]) for key in ("num_heads", "num_key_value_heads", "batch_size"))
        length = int(row["isl"])
        fitted = (lengths[length] + batches[batch]) % 2 == 0
        points.append(Point((heads, kv_heads, batch, length), float(row["latency"]) / 1e3, fitted))
    return points


def fit_prefill(points: list[Point], gpu: Gpu) -> Outcome:
    chunk_max = max(point.shape[3] for point in points)

    def cost(values: dict[str, float], shape: Shape) -> float:
        heads, kv_heads, batch, length = shape
        kernel = PrefillAttentionFit("bfloat16", **values, chunk_max=chunk_max, error=UNKNOWN)
        return kernel.seconds(gpu.peaks["bfloat16"], heads, kv_heads, 128, batch, length)

    parameters = [
        Parameter("launch_s", 1.1e-5, 2e-6, 5e-5),
        Parameter("compute_eff", 0.6, 0.2, 1.0),
        Parameter("head_row_s", 4e-10, 1e-12, 1e-8),
        Parameter("kv_row_s", 8e-10, 1e-12, 1e-8),
        Parameter("kv_head_s", 2e-8, 1e-10, 1e-6),
    ]
    return solve(points, parameters, cost)


# Widths of the models in vidur_ops.csv (their public configurations): hidden, ffn, query and KV heads of 128.
VIDUR_MODELS = {
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32),
    "meta-llama/Llama-2-70b-hf": (8192, 28672, 64, 8),
    "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32, 8),
    "meta-llama/Meta-Llama-3-70B": (8192, 28672, 64, 8),
}


def pointwise_bytes(row: Row) -> int:
    """Traffic of a pointwise operator of vidur_ops.csv in 16-bit values; 0 for other operators."""
    hidden, ffn, heads, kv_heads = VIDUR_MODELS[row["model"]]
    tp, tokens = int(row["tp"]), int(row["num_tokens"])
    values = {
        "input_layernorm": 2 * hidden,
        "post_attention_layernorm": 2 * hidden,
        "add": 3 * hidden,
        "mlp_act": 3 * ffn // tp,
        "attn_rope": 2 * 128 * (heads + kv_heads) // tp,
    }
    return 2 * tokens * values.get(row["op"], 0)


def fit_pointwise(rows: list[Row], gpu: Gpu) -> Outcome:
    points = []
    for index, row in enumerate(row for row in rows if row["device"] == gpu.vidur_name):
        traffic_bytes, seconds = pointwise_bytes(row), float(row["median_ms"]) / 1e3
        # The source rounds to whole microseconds, so shorter times carry no information.
        if traffic_bytes and seconds >= 4e-6:
            points.append(Point((traffic_bytes,), seconds, index % 2 == 0))

    def cost(values: dict[str, float], shape: Shape) -> float:
        return PointwiseFit(**values, error=UNKNOWN).seconds(gpu.bandwidth, shape[0])

    launch = Parameter("launch_s", 2e-6, 1e-6, 1e-5)
    return solve(points, [launch, Parameter("memory_eff", 0.7, 0.1, 1.0)], cost)


def collective_points(folder: Path, gpu: Gpu, method: str, devices: int) -> list[Point]:
    """`engine`: the serving engine's own all-reduce, replayed in a graph. `nccl`: the library's."""
    if method == "engine":
        found = [
            (int(row["message_size"]) * 2, float(row["latency"]) / 1e3)
            for row in rows_of(folder, "aic_allreduce.csv")
            if (row["system"], row["backend"]) == (gpu.aic_name, "vllm_graph")
            and int(row["num_gpus"]) == devices
        ]
    elif gpu.apex_name:
        found = [
            (int(row["size(kb)"]) * 1024, float(row["time(us)"]) / 1e6)
            for row in rows_of(folder, "apex_collectives.csv")
            if (row["gpu"], row["op"], row["dtype"], row["num_nodes"])
            == (gpu.apex_name, "all_reduce", "half", "1")
            and int(row["num_gpus_per_node"]) == devices
        ]
    else:
        found = [
            (int(row["bytes"]), float(row["median_ms"]) / 1e3)
            for row in rows_of(folder, "vidur_collectives.csv")
            if (row["network"], row["op"]) == (gpu.vidur_network, "all_reduce")
            and int(row["num_workers"]) == int(row["devices_per_node"]) == devices
        ]
    found = sorted(item for item in found if item[0] >= 512 and item[1] > 0)
    return [Point((size,), seconds, index % 2 == 0) for index, (size, seconds) in enumerate(found)]


def fit_collective(points: list[Point]) -> Outcome:
    def cost(values: dict[str, float], shape: Shape) -> float:
        return CollectiveFit(**values, error=UNKNOWN).seconds(shape[0])

    parameters = [
        Parameter("latency_s", 1e-5, 1e-6, 1e-3),
        Parameter("bytes_per_s", 1e11, 1e9, 1e12),
        Parameter("sharpness", 1.5, 1.0, 12.0),
    ]
    return solve(points, parameters, cost)


def section(outcome: Outcome, **more: Any) -> dict[str, Any]:
    rounded = {name: float(f"{value:.5g}") for name, value in outcome.values.items()}
    found = outcome.error
    tail = {
        "median_error_frac": round(found.median, 4),
        "p90_error_frac": round(found.p90, 4),
        "points": found.points,
    }
    return {**more, **rounded, **tail}


def fit_gpu(folder: Path, gpu: Gpu, table: list[str]) -> dict[str, Any]:
    """One profile's values; rows of the error table are appended to `table`."""
    operators: dict[str, Any] = {"gemm": {}}

    def note(operator: str, outcome: Outcome) -> None:
        found = outcome.error
        figures = f"{found.points} | {found.median:.1%} | {found.p90:.1%} | {found.worst:.0%}"
        table.append(f"| {gpu.name} | {operator} | {figures} |")

    gemm_rows = rows_of(folder, "aic_gemm.csv")
    for dtype, label in (("bfloat16", "bfloat16"), ("float8", "fp8")):
        points = gemm_points(gemm_rows, gpu, label)
        if points:
            outcome = fit_gemm(points, gpu, dtype)
            operators["gemm"][dtype] = section(outcome, rows_max=max(point.shape[0] for point in points))
            note(f"gemm {dtype}", outcome)
    decode = decode_points(rows_of(folder, "aic_generation_attention.csv"), gpu)
    outcome = fit_decode(decode, gpu)
    sizes = {"sequences_max": max(p.shape[2] for p in decode), "context_max": max(p.shape[3] for p in decode)}
    operators["decode_attention"] = section(outcome, **sizes)
    note("decode attention", outcome)
    prefill = prefill_points(rows_of(folder, "aic_context_attention.csv"), gpu)
    outcome = fit_prefill(prefill, gpu)
    chunk_max = max(point.shape[3] for point in prefill)
    operators["prefill_attention"] = section(outcome, dtype="bfloat16", chunk_max=chunk_max)
    note("prefill attention", outcome)
    outcome = fit_pointwise(rows_of(folder, "vidur_ops.csv"), gpu)
    operators["pointwise"] = section(outcome)
    note("pointwise" + ("" if gpu.has_pointwise else f" (of {gpu.vidur_name})"), outcome)
    links: dict[str, Any] = {}
    for method, widths in gpu.links.items():
        for devices in widths:
            outcome = fit_collective(collective_points(folder, gpu, method, devices))
            links.setdefault(method, {})[str(devices)] = section(outcome)
            note(f"all-reduce {method}, {devices} devices", outcome)
    return gpu.profile(operators, links)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data/hardware")
    table: list[str] = []
    header = {"schema_version": SCHEMA_VERSION, "kind": "hardware"}
    fitted = {gpu.name: fit_gpu(folder, gpu, table) for gpu in GPUS}
    comment = "Fitted by `python -m benchmarks.fit_profiles`; the forms are explained in docs/twin-costs.md."
    for name, values in fitted.items():
        (PROFILES / f"{name}.toml").write_text(toml_text({**header, **values}, comment))
    for name, derive in ASSUMED.items():
        text = toml_text({**header, **derive(fitted)}, "Written by `python -m benchmarks.fit_profiles`.")
        (PROFILES / f"{name}.toml").write_text(text)
    for engine in ENGINES:
        values = {"schema_version": SCHEMA_VERSION, "kind": "engine", **dataclasses.asdict(engine)}
        (PROFILES / f"engine-{engine.name}.toml").write_text(toml_text(values))
    write_section("twin-operators", results(table))
    print("\n".join(table))


def results(table: list[str]) -> str:
    return "\n".join(
        [
            "`python -m benchmarks.fit_profiles ../shared/data/hardware`",
            "",
            "Relative error of the GPU profiles' operators on the half of the points that was not fitted.",
            "How the halves are drawn: head of the script. Sources: each profile's `[sources]`.",
            "",
            "| device | operator | held-out points | median | p90 | worst |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
            *table,
        ]
    )


if __name__ == "__main__":
    main()
