"""Prompts before decodes: best for a prompt that waits, worst for whoever is being answered (vLLM 0.2)."""

from __future__ import annotations

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.sarathi import LONG_NAMES, STREAMS, beside_streams
from benchmarks.effects.serving import Load, Served, azure_lengths, limits, poisson, serve, settings_of
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

KV_TOKENS = 400_000
REQUESTS, RATE_RPS = 800, 12.0
QUANTILES = tuple(index / 100 for index in range(100))


def _served(compose: str, step_tokens: int, load: Load) -> Served:
    return serve(load, settings_of(compose=compose), limits(KV_TOKENS, step_tokens_max=step_tokens))


def _burst() -> Load:
    """64 running answers, and then eight prompts of 4000 tokens at once."""
    requests = [Request(f"s{index}", 64, 600, 0.0) for index in range(64)]
    return Load([*requests, *(Request(f"b{index}", 4000, 16, 0.5) for index in range(8))])


def wins() -> Measured:
    """Llama-3-8B on an H100: eight prompts of 4000 tokens arrive at once beside 64 running answers.

    Compared with `sarathi` at its usual 512 tokens a step.
    """
    names = [f"b{index}" for index in range(8)]
    ours, other = _served("prefill-first", 8192, _burst()), _served("sarathi", 512, _burst())
    ttft, ttft_other = (float(each.values("ttft_s", names).mean()) for each in (ours, other))
    steps = range(1, 9)
    chart = Chart(
        "First tokens of eight prompts that arrive at once",
        "seconds after arrival",
        [float(step) for step in steps],
        [
            Series(name, f"s{index + 1}", sorted(served.values("ttft_s", names).tolist()))
            for index, (name, served) in enumerate({"prefill-first": ours, "sarathi": other}.items())
        ],
        lambda x: f"{x:.0f}",
        lambda y: f"{y:.2f} s",
    )
    return Measured(
        f"mean TTFT of the burst {ttft_other * 1e3:.0f} → {ttft * 1e3:.0f} ms",
        (Claim("mean TTFT, sarathi / prefill-first", ttft_other / ttft, low=1.15),),
        (chart,),
    )


def loses() -> Measured:
    """Azure conversation lengths at 12 requests/s: every prompt stops all the answers beside it."""
    load = poisson(azure_lengths()[:REQUESTS], RATE_RPS)
    ours, other = _served("prefill-first", 8192, load), _served("sarathi", 512, load)
    gap, gap_other = (float(np.quantile(each.gaps_s(), 0.99)) for each in (ours, other))
    return Measured(
        f"P99 gap {gap_other * 1e3:.0f} → {gap * 1e3:.0f} ms",
        (Claim("P99 gap, prefill-first / sarathi", gap / gap_other, low=3.0),),
    )


def live() -> Measured:
    """SmolLM2-135M: twelve streams, and six prompts of 1500 tokens after each other."""
    ours, other = beside_streams("prefill-first", 4096), beside_streams("sarathi", 128)
    ttft, ttft_other = (float(each.values("ttft_s", LONG_NAMES).mean()) for each in (ours, other))
    names = [f"s{index}" for index in range(STREAMS)]
    gap, gap_other = (float(each.gaps_s(names).max()) for each in (ours, other))
    return Measured(
        f"mean TTFT of the long prompts {ttft_other:.2f} → {ttft:.2f} s; "
        f"longest gap {gap_other * 1e3:.0f} → {gap * 1e3:.0f} ms",
        (Claim("mean TTFT, sarathi / prefill-first", ttft_other / ttft, low=1.04),),
    )


EFFECTS = (
    Effect(
        "compose",
        "prefill-first",
        "best time to first token: no prompt is cut or shares its step (vLLM 0.2)",
        wins,
        loses,
        live,
    ),
)
