"""What the scenarios of lanes have in common: loads, devices, stacks, and the rate at which they hold."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from benchmarks.effects.effect import Claim, Measured
from benchmarks.effects.live import same_outputs, serve_live
from benchmarks.effects.serving import (
    LLAMA_3_8B,
    NO_PATH,
    Load,
    Served,
    limits,
    llama_8b,
    poisson,
    serve,
    settings_of,
)
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.models.config import ModelConfig, RopeConfig
from penstock.twin.costs.hardware import HardwareProfile, load_engine, load_hardware
from penstock.twin.costs.model import CostModel, Seconds
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec
from penstock.twin.costs.work import StepCost, StepWork
from penstock.twin.replica import TwinReplica

HARDWARE, ENGINE = "a100-80g", "vllm-2024"
CHUNK_TOKENS = 2048  # of the prefill lane: bounds activations
RUNNING_MAX = 512
OPEN_DOOR = "[desk]\nqueue_requests_max = 65536\nqueue_wait_s_max = 1e6\nqueue_tokens_max = 1000000000\n"
QWEN_25_3B = ModelConfig(
    architecture="qwen2",
    vocab=151_936,
    hidden=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    head_dim=128,
    ffn=11_008,
    context_len=32_768,
    norm_eps=1e-6,
    layer_rope=(RopeConfig(1e6),) * 36,
    sliding_window=(None,) * 36,
    attention_scale=128**-0.5,
)


def laned(lanes: str, options: Mapping[str, float | bool] | None = None, **policies: str) -> Settings:
    """Two lanes under `lanes` with its options; chunked prompts in the prefill lane."""
    lines = [f"{name} = {str(value).lower()}" for name, value in (options or {}).items()]
    file = OPEN_DOOR + "\n".join([f"[policies.options.{lanes}]", *lines])
    return settings_of("sarathi", file, lanes=lanes, **policies)


def one_loop(preset: str, **policies: str) -> Settings:
    return settings_of(preset, OPEN_DOOR, **policies)


def run(
    load: Load,
    settings: Settings,
    step_tokens: int = CHUNK_TOKENS,
    cost: CostModel | None = None,
    **more: Any,
) -> Served:
    """On Llama-3-8B and one A100, with all of its KV, unless another cost model is given."""
    cost = cost or a100()
    assert isinstance(cost, RooflineCostModel)
    sizes = limits(cost.kv_tokens_max(), step_tokens_max=step_tokens, running_max=RUNNING_MAX)
    return serve(load, settings, sizes, cost, **more)


def prompt_first(load: Load, cost: CostModel | None = None) -> Served:
    return run(load, one_loop("vllm-v0"), 8192, cost)


@cache
def a100() -> RooflineCostModel:
    found = llama_8b(HARDWARE, ENGINE)
    assert isinstance(found, RooflineCostModel)
    return found


@cache
def l20() -> RooflineCostModel:
    """Qwen2.5-3B's shape on an L20: the L40S's fits, with the L20's data sheet (119.5 TFLOP/s, 92 units).

    Both have 48 GB at 864 GB/s, and chips of one generation.
    """
    base = load_hardware("l40s")
    slower = 119.5e12 / base.peak_flops["bfloat16"]
    peaks = {dtype: peak * slower for dtype, peak in base.peak_flops.items()}
    hardware = replace(base, name="l20", units=92, peak_flops=peaks)
    return RooflineCostModel(ModelSpec.of(QWEN_25_3B), hardware, load_engine(ENGINE))


def sharegpt_like(count: int, seed: int = 1) -> tuple[tuple[int, int], ...]:
    """(prompt, output) tokens: log-normal, means 210 and 190, with ShareGPT's long tails."""
    draw = random.Random(f"sharegpt/{seed}")
    found = []
    for _ in range(count):
        prompt, output = draw.lognormvariate(4.674, 1.2), draw.lognormvariate(4.798, 1.0)
        found.append((int(min(4000, max(4, prompt))), int(min(2000, max(2, output)))))
    return tuple(found)


def drawn(draw: random.Random, mean: float, spread: float, low: int, high: int) -> int:
    """A log-normal length of about this mean, within bounds."""
    return int(min(high, max(low, draw.lognormvariate(math.log(mean) - spread * spread / 2, spread))))


def attained_frac(served: Served, ttft_s: float, tpot_s: float, since_s: float = 0.0) -> float:
    """Of the requests that came since then; refused ones count as misses."""
    met = [
        outcome.ttft_s is not None and outcome.ttft_s <= ttft_s and (outcome.tpot_s or 0.0) <= tpot_s
        for outcome in served.outcomes.values()
        if outcome.arrival_s >= since_s
    ]
    return float(np.mean(met))


def rate_at(frac: float, rates: Sequence[float], attained: Callable[[float], float]) -> float:
    """The rate at which attainment falls to `frac`, between the first of ascending `rates` that fails and
    the one before it, linearly."""
    before_rate, before = rates[0], 1.0
    for rate in rates:
        value = attained(rate)
        if value < frac:
            return before_rate + (rate - before_rate) * (before - frac) / (before - value)
        before_rate, before = rate, value
    return before_rate


# ---- two devices of half the size, one a phase ------------------------------------------------------------


@cache
def half_a100() -> RooflineCostModel:
    """Half the units, bandwidth and memory of an A100; the weights do not get smaller."""
    whole = load_hardware(HARDWARE)
    return RooflineCostModel(ModelSpec.of(LLAMA_3_8B), _halved(whole), load_engine(ENGINE))


def _halved(whole: HardwareProfile) -> HardwareProfile:
    peaks = {dtype: peak / 2 for dtype, peak in whole.peak_flops.items()}
    return replace(
        whole,
        name=f"half {whole.name}",
        memory_bytes=whole.memory_bytes / 2,
        bandwidth=whole.bandwidth / 2,
        units=whole.units // 2,
        peak_flops=peaks,
    )


class _PromptsAreThere:
    """Decodes as `cost` says; prompts come with their KV, and copying it is free."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.relative_error = cost.relative_error

    def seconds(self, work: StepWork) -> float:
        if not work.decodes:
            return 1e-9
        return self._cost.seconds(StepWork((), work.decodes, work.decode_context, work.decodes))

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Seconds:
        return self._cost.decode_seconds(decodes, decode_context, steps)

    def step(self, work: StepWork) -> StepCost:
        return self._cost.step(work)


def two_halves_attained(
    lengths: Sequence[tuple[int, int]], rate_rps: float, ttft_s: float, tpot_s: float
) -> float:
    """Prefill on one half-size device, decode on another, KV copied for nothing (DistServe at its best)."""
    cost = half_a100()
    sizes = limits(cost.kv_tokens_max(), step_tokens_max=8192, running_max=RUNNING_MAX)
    settings = one_loop("vllm-v0")
    load = poisson(lengths, rate_rps)
    first = serve(
        Load([replace(request, max_output_tokens=1) for request in load.requests]), settings, sizes, cost
    )
    firsts_s = {name: outcome.first_token_s or 0.0 for name, outcome in first.outcomes.items()}
    moved = [replace(request, arrival_s=firsts_s[request.id]) for request in load.requests]
    moved.sort(key=lambda request: request.arrival_s)
    second = serve(Load(moved), settings, sizes, _PromptsAreThere(cost), path=NO_PATH)
    met = []
    for request in load.requests:
        outcome = second.outcomes[request.id]
        span_s = (outcome.last_token_s or math.inf) - firsts_s[request.id]
        tokens = max(1, request.max_output_tokens - 1)
        met.append(firsts_s[request.id] - request.arrival_s <= ttft_s and span_s / tokens <= tpot_s)
    return float(np.mean(met))


# ---- what the lanes did -----------------------------------------------------------------------------------


class Watch:
    """The prefill share while both lanes are in use, as (instant, share), and the steps until each change."""

    def __init__(self) -> None:
        self.shares: list[tuple[float, float]] = []
        self.steps: list[int] = []

    def __call__(self, twin: TwinReplica) -> None:
        shares = getattr(twin.replica, "shares", None)
        if shares is None:
            return
        part = shares.prefill / (shares.prefill + shares.decode)
        if not self.shares or self.shares[-1][1] != part:
            self.shares.append((twin.now_s, part))
            self.steps.append(twin.executor.steps)


def with_arrivals(
    draw: random.Random, until_s: float, next_one: Callable[[float], tuple[float, int, int]]
) -> Load:
    """Requests until then: `next_one(now)` says rate, prompt and output of the next."""
    now_s, requests = 0.0, []
    while True:
        rate_rps, prompt, output = next_one(now_s)
        now_s += draw.expovariate(rate_rps)
        if now_s > until_s:
            return Load(requests)
        requests.append(Request(f"r{len(requests)}", prompt, output, now_s))


# ---- on the CPU engine ------------------------------------------------------------------------------------

LIVE_STREAMS = [f"s{index}" for index in range(8)]
LIVE_PROMPTS = [f"p{index}" for index in range(4)]


def lanes_live(lanes: str) -> Measured:
    """SmolLM2-135M: eight sequences decode when four prompts of 2000 tokens come; a thread a lane.

    Against prompts first. Two cores can be split in one way only: what moves shares has nothing to move.
    """
    streams = [Request(name, 32, 200, 0.0) for name in LIVE_STREAMS]
    prompts = [Request(name, 2000, 1, 1.0 + 0.1 * index) for index, name in enumerate(LIVE_PROMPTS)]
    load, sizes = Load([*streams, *prompts]), limits(20_000, running_max=32, step_tokens_max=2048)
    before = serve_live(load, settings_of("vllm-v0"), sizes)
    after = serve_live(load, settings_of("vllm-v0", lanes=lanes), sizes)
    gaps_s = [float(each.gaps_s(LIVE_STREAMS).max()) for each in (before, after)]
    ttfts_s = [float(each.values("ttft_s", LIVE_PROMPTS).mean()) for each in (before, after)]
    return Measured(
        f"longest gap {gaps_s[0] * 1e3:.0f} → {gaps_s[1] * 1e3:.0f} ms; mean TTFT of the prompts "
        f"{ttfts_s[0]:.1f} → {ttfts_s[1]:.1f} s; outputs equal",
        (
            Claim("longest gap, prompts first / lanes", gaps_s[0] / gaps_s[1], low=3.0),
            same_outputs(before, after),
        ),
    )
