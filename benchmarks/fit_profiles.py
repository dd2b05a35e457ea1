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
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fit_engine, other_source
from benchmarks.fitting import Errors, Parameter, errors, fit
from benchmarks.gpu_facts import ASSUMED, ENGINES, GPUS, Engine, Gpu
from benchmarks.results import write_section
from penstock.twin.costs.hardware import PROFILES, load_engine, load_hardware
from penstock.twin.costs.least_squares import nonnegative
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

OTHER_SOURCE = "blis_h100_kernels.csv"
UNKNOWN = FitError(0.0, 0.0, 0)
# What engines run: contexts that a prompt can have, chunks that fill a budget of rows. Points outside, such
# as 256 prompts of 16 tokens or a context of 2, are neither fitted nor counted.
DECODE_CONTEXT_MIN, DECODE_BATCH_MAX = 64, 512
PREFILL_LENGTH_MIN, PREFILL_ROWS_MAX = 16, 32768
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


def static_points(folder: Path) -> list[Point]:
    """Plain float8 products of the other source; shapes of both halves differ in n or k."""
    shapes = other_source.gemm_shapes(rows_of(folder, OTHER_SOURCE))
    ranked = {pair: index for index, pair in enumerate(sorted({shape[1:3] for shape in shapes}))}
    return [Point((m, n, k), seconds, ranked[n, k] % 2 == 0) for m, n, k, seconds in shapes]


def fit_gemm(points: list[Point], gpu: Gpu, dtype: str) -> Outcome:
    value_bytes = 1.0 if dtype.startswith("float8") else 2.0
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
        if context < DECODE_CONTEXT_MIN or batch > DECODE_BATCH_MAX:
            continue
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
        if length < PREFILL_LENGTH_MIN or length * batch > PREFILL_ROWS_MAX:
            continue
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


VIDUR_HIDDEN = {"meta-llama/Llama-2-7b-hf": 4096, "meta-llama/Llama-2-70b-hf": 8192}
"""Widths of the models whose residual additions are used (their public configurations)."""
VIDUR_BANDWIDTH = {gpu.vidur_name: gpu.bandwidth for gpu in GPUS if gpu.has_pointwise}
TIMER_STEP_S = 1e-6
SMALL_ROWS = 16
FUSED_LAYERS = ("layernorm", "act_fn", "rotary_emb")


def fit_pointwise(folder: Path, gpu: Gpu) -> Outcome:
    """The launch from one source, the traffic from another; errors of the traffic on held-out sizes.

    Launch: median time of vLLM's fused norm, activation and rotary kernels at few rows, where only the launch
    counts; measured on other devices, to nanoseconds. Traffic: additions of three activations in memory, of
    eight timer steps and more, because their source rounds to whole microseconds.
    """
    small = [
        float(row["time_us"]) / 1e6
        for row in rows_of(folder, "llmservingsim_dense.csv")
        if row["layer"] in FUSED_LAYERS and int(row["tokens"]) <= SMALL_ROWS
    ]
    launch_s = float(np.median(small))
    points: list[Point] = []
    for row in rows_of(folder, "vidur_ops.csv"):
        picked = (row["device"], row["op"], row["tp"]) == (gpu.vidur_name, "add", "1")
        if picked and row["model"] in VIDUR_HIDDEN and float(row["median_ms"]) / 1e3 >= 8 * TIMER_STEP_S:
            traffic_bytes = 3 * 2 * VIDUR_HIDDEN[row["model"]] * int(row["num_tokens"])
            points.append(Point((traffic_bytes,), float(row["median_ms"]) / 1e3, len(points) % 2 == 0))

    def cost(values: dict[str, float], shape: Shape) -> float:
        kernel = PointwiseFit(launch_s, values["memory_eff"], UNKNOWN)
        return kernel.seconds(VIDUR_BANDWIDTH[gpu.vidur_name], shape[0])

    outcome = solve(points, [Parameter("memory_eff", 0.7, 0.1, 1.0)], cost)
    return Outcome({"launch_s": launch_s, **outcome.values}, outcome.error)


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


def fit_collective(points: list[Point], regimes: int) -> tuple[dict[str, list[float]], Errors]:
    """Regimes fitted to all points; the error is of the other half, under regimes fitted to one half."""
    one_half = _regimes([point for point in points if point.fitted], regimes)
    others = [point for point in points if not point.fitted]
    predicted = [CollectiveFit(**one_half, error=UNKNOWN).seconds(point.shape[0]) for point in others]
    found = errors(predicted, [point.seconds for point in others])
    whole = {
        name: [float(f"{value:.5g}") for value in values]
        for name, values in _regimes(points, regimes).items()
    }
    return whole, found


def _regimes(points: Sequence[Point], regimes: int) -> dict[str, tuple[float, ...]]:
    """The best straight lines over so many ranges of sizes: every choice of switches is tried."""
    best: tuple[float, dict[str, tuple[float, ...]]] | None = None
    for switches in itertools.combinations(range(2, len(points) - 1), regimes - 1):
        bounds = (0, *switches, len(points))
        if any(high - low < 2 for low, high in itertools.pairwise(bounds)):
            continue
        lines = [_line(points[low:high]) for low, high in itertools.pairwise(bounds)]
        loss = sum(line[2] for line in lines)
        if best is None or loss < best[0]:
            starts = (0.0, *(float(points[index].shape[0]) for index in switches))
            latencies, rates = tuple(line[0] for line in lines), tuple(line[1] for line in lines)
            best = loss, {"starts_bytes": starts, "latency_s": latencies, "bytes_per_s": rates}
    assert best is not None
    return best[1]


def _line(points: Sequence[Point]) -> tuple[float, float, float]:
    """Latency, bytes a second and the sum of squared relative errors of a line with no negative part."""
    target = np.array([point.seconds for point in points])
    matrix = np.array([[1e-6, point.shape[0] * 1e-12] for point in points]) / target[:, None]
    latency, inverse = nonnegative(matrix, np.ones(len(points)))
    residual = matrix @ np.array([latency, inverse]) - 1.0
    return max(latency, 1e-3) * 1e-6, 1e12 / max(inverse, 1e-3), float(residual @ residual)


def error_fields(found: Errors) -> dict[str, Any]:
    return {
        "median_error_frac": round(found.median, 4),
        "p90_error_frac": round(found.p90, 4),
        "points": found.points,
    }


def section(outcome: Outcome, **more: Any) -> dict[str, Any]:
    rounded = {name: float(f"{value:.5g}") for name, value in outcome.values.items()}
    return {**more, **rounded, **error_fields(outcome.error)}


def fit_gpu(folder: Path, gpu: Gpu, table: list[str]) -> dict[str, Any]:
    """One profile's values; rows of the error table are appended to `table`."""
    operators: dict[str, Any] = {"gemm": {}}

    def note(operator: str, found: Errors) -> None:
        figures = f"{found.points} | {found.median:.1%} | {found.p90:.1%} | {found.worst:.0%}"
        table.append(f"| {gpu.name} | {operator} | {figures} |")

    gemm_rows = rows_of(folder, "aic_gemm.csv")
    for dtype, label in (("bfloat16", "bfloat16"), ("float8", "fp8")):
        points = gemm_points(gemm_rows, gpu, label)
        if points:
            outcome = fit_gemm(points, gpu, dtype)
            operators["gemm"][dtype] = section(outcome, rows_max=max(point.shape[0] for point in points))
            note(f"gemm {dtype}", outcome.error)
    if "float8-static" in gpu.peaks:
        points = static_points(folder)
        outcome = fit_gemm(points, gpu, "float8-static")
        rows_max = max(point.shape[0] for point in points)
        operators["gemm"]["float8-static"] = section(outcome, rows_max=rows_max)
        note("gemm float8, inputs quantised before", outcome.error)
    decode = decode_points(rows_of(folder, "aic_generation_attention.csv"), gpu)
    outcome = fit_decode(decode, gpu)
    sizes = {"sequences_max": max(p.shape[2] for p in decode), "context_max": max(p.shape[3] for p in decode)}
    operators["decode_attention"] = section(outcome, **sizes)
    note("decode attention", outcome.error)
    prefill = prefill_points(rows_of(folder, "aic_context_attention.csv"), gpu)
    outcome = fit_prefill(prefill, gpu)
    chunk_max = max(point.shape[3] for point in prefill)
    operators["prefill_attention"] = section(outcome, dtype="bfloat16", chunk_max=chunk_max)
    note("prefill attention", outcome.error)
    outcome = fit_pointwise(folder, gpu)
    operators["pointwise"] = section(outcome)
    note("pointwise traffic" + ("" if gpu.has_pointwise else f" (of {gpu.vidur_name})"), outcome.error)
    links: dict[str, Any] = {}
    for method, widths in gpu.links.items():
        for devices in widths:
            # Timed one by one, vidur's small messages scatter five-fold: one line is all that they bear.
            regimes = 1 if method == "nccl" and gpu.vidur_network else 3
            values, found = fit_collective(collective_points(folder, gpu, method, devices), regimes)
            links.setdefault(method, {})[str(devices)] = {**values, **error_fields(found)}
            note(f"all-reduce {method}, {devices} devices", found)
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
        write_engine(engine)
    # The overheads of this engine are fitted on the operators that have just been written.
    fitted_engine = fit_engine.fitted_engine(load_engine("vllm-2024"))
    overhead = {"step_s": fitted_engine.step_s, "sequence_s": fitted_engine.sequence_s}
    vllm_2024 = next(engine for engine in ENGINES if engine.name == "vllm-2024")
    write_engine(dataclasses.replace(vllm_2024, overhead={**vllm_2024.overhead, **overhead}))
    write_section("twin-apex", fit_engine.table(load_engine("vllm-2024")))
    second_opinion(folder, table)
    write_section("twin-operators", results(table))
    print("\n".join(table))


def second_opinion(folder: Path, table: list[str]) -> None:
    """Adds the H100 profile's errors on points of another laboratory."""
    rows, profile = rows_of(folder, OTHER_SOURCE), load_hardware("h100-sxm")
    found = {
        "decode attention": other_source.decode_error(rows, profile),
        "prefill attention": other_source.prefill_error(rows, profile),
    }
    for operator, error in found.items():
        figures = f"{error.points} | {error.median:.1%} | {error.p90:.1%} | {error.worst:.0%}"
        table.append(f"| h100-sxm | {operator}, of another laboratory | {figures} |")


def write_engine(engine: Engine) -> None:
    values = {"schema_version": SCHEMA_VERSION, "kind": "engine", **dataclasses.asdict(engine)}
    (PROFILES / f"engine-{engine.name}.toml").write_text(toml_text(values))


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
