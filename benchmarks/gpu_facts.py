"""Facts about devices and engines that no fit can give, each with its source; read by fit_profiles.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

AIC = "ai-dynamo/aiconfigurator systems/data (commit 095f58a, Apache-2.0), vLLM 0.14 kernels"
APEX = "microsoft/apex_plus profile/comm (commit 8769096), NCCL"
BLIS = "inference-sim/inference-sim, branch stepml-experiments, bench_data"
VIDUR = "microsoft/vidur data/profiling (commit 7d47513)"
LLMSERVINGSIM = "casys-kaist/LLMServingSim profiler/perf (commit 5daddb2)"
CARD_POWER = "idle assumed; limit: vendor's data sheet; form, memory_share and exponent: card polca (assumed)"


@dataclass(frozen=True)
class Gpu:
    """One device: its data sheet, and the names it has in the measurements."""

    name: str
    description: str
    memory_bytes: float
    bandwidth: float
    units: int
    peaks: dict[str, float]  # dense
    idle_w: float
    max_w: float
    sheet: str
    aic_name: str
    vidur_name: str
    has_pointwise: bool  # whether vidur_name is this device, or the nearest that was measured
    links: dict[str, tuple[int, ...]] = field(default_factory=dict)
    apex_name: str = ""
    vidur_network: str = ""
    cache_bytes: float = 0.0  # where its measurements were taken out of this cache; 0: cold

    def profile(self, operators: dict[str, Any], links: dict[str, Any]) -> dict[str, Any]:
        nearest = "" if self.has_pointwise else f", of the {self.vidur_name}: not measured on this device"
        nccl = APEX if self.apex_name else VIDUR
        names = {"engine": f"{AIC}, replayed in a graph", "nccl": nccl}
        sources = {
            "device": self.sheet,
            "peak_flops": f"{self.sheet}; dense",
            "power": CARD_POWER,
            "operators.gemm": AIC,
            **({"operators.gemm.float8-static": BLIS} if "float8-static" in self.peaks else {}),
            "operators.decode_attention": AIC,
            "operators.prefill_attention": AIC,
            "operators.pointwise": f"traffic: {VIDUR}{nearest}; launch: {LLMSERVINGSIM}, other devices",
            **{f"links.{method}": names[method] for method in links},
        }
        return {
            "name": self.name,
            "description": self.description,
            "device": {
                "memory_bytes": self.memory_bytes,
                "bandwidth_bytes_per_s": self.bandwidth,
                "compute_units": self.units,
            },
            "peak_flops": self.peaks,
            "power": {
                "idle_w": self.idle_w,
                "max_w": self.max_w,
                "memory_share": 0.35,
                "exponent": 2.5,
                "status": "published",
            },
            "operators": operators,
            "links": links,
            "sources": sources,
        }


GPUS = (
    Gpu(
        "h100-sxm",
        "NVIDIA H100 SXM5, 80 GB",
        80e9,
        3.35e12,
        132,
        {"bfloat16": 989.5e12, "float8": 1979e12, "float8-static": 1979e12},
        70.0,
        700.0,
        "NVIDIA H100 data sheet (SXM5)",
        "h100_sxm",
        "h100",
        True,
        {"engine": (2, 4, 8), "nccl": (2, 4, 8)},
        apex_name="H100-SXM-80GB",
    ),
    Gpu(
        "h200-sxm",
        "NVIDIA H200 SXM5, 141 GB",
        141e9,
        4.8e12,
        132,
        {"bfloat16": 989.5e12, "float8": 1979e12},
        75.0,
        700.0,
        "NVIDIA H200 data sheet (SXM5)",
        "h200_sxm",
        "h100",
        False,
        {"engine": (2, 4, 8), "nccl": (2, 4, 8)},
        apex_name="H200",
    ),
    Gpu(
        "a100-80g",
        "NVIDIA A100 SXM4, 80 GB",
        80e9,
        2.039e12,
        108,
        {"bfloat16": 312e12},
        50.0,
        400.0,
        "NVIDIA A100 data sheet (SXM4, 80 GB)",
        "a100_sxm",
        "a100",
        True,
        {"engine": (2, 4, 8), "nccl": (2, 4, 8)},
        vidur_network="a100_dgx",
    ),
    Gpu(
        "l40s",
        "NVIDIA L40S, 48 GB, PCIe",
        48e9,
        864e9,
        142,
        {"bfloat16": 362e12, "float8": 733e12},
        35.0,
        350.0,
        "NVIDIA L40S data sheet",
        "l40s",
        "a100",
        False,
        {"engine": (2, 4, 8)},
        cache_bytes=96e6,
    ),
)


def assumed_a10(fitted: dict[str, Any]) -> dict[str, Any]:
    """A10: no measurement at hand. Data-sheet peaks, with the A100's efficiencies and fixed times."""
    values = copy.deepcopy(fitted["a100-80g"])
    assumed = "assumed: the A100's fit applied to this device's peaks; nothing was measured"
    gemm = {"bfloat16": values["operators"]["gemm"]["bfloat16"]}
    values["operators"]["gemm"] = gemm
    for fit in (
        *gemm.values(),
        *(values["operators"][name] for name in values["operators"] if name != "gemm"),
    ):
        fit.update(median_error_frac=0.25, p90_error_frac=0.5, points=0)
    # Fixed work a row and a head runs on compute units, of which there are fewer and at half the rate.
    for name in ("decode_attention", "prefill_attention"):
        for key in ("kv_head_s", "head_s", "head_row_s", "kv_row_s"):
            if key in values["operators"][name]:
                values["operators"][name][key] *= 2.5
    sheet = "NVIDIA A10 data sheet"
    sources = {key: assumed for key in values["sources"] if key.startswith("operators")}
    return {
        "name": "a10",
        "description": "NVIDIA A10, 24 GB, PCIe: assumed from the A100",
        "device": {"memory_bytes": 24e9, "bandwidth_bytes_per_s": 600e9, "compute_units": 72},
        "peak_flops": {"bfloat16": 125e12},
        "power": {**values["power"], "idle_w": 20.0, "max_w": 150.0},
        "operators": values["operators"],
        "sources": {"device": sheet, "peak_flops": f"{sheet}; dense", "power": CARD_POWER, **sources},
    }


def cpu_facts(_: dict[str, Any]) -> dict[str, Any]:
    """The development machine, from measured peaks; `penstock calibrate` replaces it with step fits."""
    facts = "measured peaks of the development machine (2 cores, AMD EPYC Zen 5)"
    assumed = f"{facts}; efficiencies assumed until `penstock calibrate` has run"
    error = {"median_error_frac": 0.3, "p90_error_frac": 0.6, "points": 0}
    gemm = {
        "rows_max": 8192,
        "launch_s": 3e-6,
        "compute_eff": 0.6,
        "memory_eff": 0.8,
        "sharpness": 2.0,
        "wave_waste": 0.0,
        "input_passes": 0.0,
        **error,
    }
    attention = {"launch_s": 1e-5, "kv_head_s": 1e-6, "head_s": 2e-7, "memory_eff": 0.6}
    return {
        "name": "cpu-2core",
        "description": "Two cores of an AMD EPYC (Zen 5, AVX-512, no AMX): placeholder",
        "device": {"memory_bytes": 24e9, "bandwidth_bytes_per_s": 48e9, "compute_units": 2},
        "peak_flops": {"float32": 238e9, "bfloat16": 979e9, "int8": 2.13e12},
        "power": {"idle_w": 5.0, "max_w": 20.0, "memory_share": 0.35, "exponent": 2.5, "status": "assumed"},
        "operators": {
            "gemm": {dtype: gemm for dtype in ("float32", "bfloat16", "int8")},
            "decode_attention": {
                **attention,
                "stream_bytes_per_s": 40e9,
                "splits": 2.0,
                "sequences_max": 256,
                "context_max": 8192,
                **error,
            },
            "prefill_attention": {
                "dtype": "bfloat16",
                "launch_s": 1e-5,
                "compute_eff": 0.3,
                "head_row_s": 2e-8,
                "kv_row_s": 2e-8,
                "kv_head_s": 1e-6,
                "chunk_max": 8192,
                **error,
            },
            "pointwise": {"launch_s": 3e-6, "memory_eff": 0.5, **error},
        },
        "sources": {
            "device": f"FACTS.md: {facts}",
            "peak_flops": f"FACTS.md: {facts}",
            "power": "assumed",
            "operators": f"FACTS.md: {assumed}",
        },
    }


ASSUMED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"a10": assumed_a10, "cpu-2core": cpu_facts}


@dataclass(frozen=True)
class Engine:
    """An engine profile, as its file is written."""

    name: str
    description: str
    overhead: dict[str, Any]
    sources: dict[str, str]


SAMPLER = f"sample_passes: sampler times of {LLMSERVINGSIM}, beyond 64 sequences"

ENGINES = (
    Engine(
        "vllm-2024",
        "vLLM 0.5.4 (August 2024), custom all-reduce off",
        {
            "step_s": 2.25e-3,
            "sequence_s": 2.8e-4,
            "kernel_s": 0.0,
            "sample_passes": 2.4,
            "request_s": 1.5e-2,
            "all_reduce": "nccl",
            "error_frac": 0.04,
        },
        {
            "overhead": "microsoft/apex_plus vllm/results (8 H100): step_s and sequence_s fitted to the mean "
            "TPOT of lmsys_025 and creation_05 under TP8 and TP2 by `python -m benchmarks.fit_profiles`; "
            f"request_s is what the mean TTFT of lmsys_025 leaves; {SAMPLER}"
        },
    ),
    Engine(
        "vllm-2025",
        "vLLM V1 with graphs and overlapped scheduling (0.10 and later)",
        {
            "step_s": 3e-4,
            "sequence_s": 5e-6,
            "kernel_s": 0.0,
            "sample_passes": 2.4,
            "request_s": 5e-3,
            "all_reduce": "engine",
            "error_frac": 0.08,
        },
        {
            "overhead": "step_s, request_s: published TPOT and TTFT p50 of Llama-3.1-8B at 1 and 4 streams "
            "on one H100 under vLLM 0.21 (yobitelcomm.github.io/bench, concurrency sweep); "
            "sequence_s assumed; "
            f"{SAMPLER}"
        },
    ),
    Engine(
        "penstock-cpu",
        "Penstock's own engine on a CPU: placeholder until `penstock calibrate` has run",
        {
            "step_s": 5e-4,
            "sequence_s": 5e-5,
            "kernel_s": 2e-6,
            "sample_passes": 2.0,
            "request_s": 2e-3,
            "all_reduce": "none",
            "error_frac": 0.3,
        },
        {"overhead": "assumed"},
    ),
)
