"""The last in rank yields: the best-ranked always advance, whatever it costs the youngest (vLLM v1)."""

from __future__ import annotations

import numpy as np

from benchmarks.effects.baselines import Cheapest, Oldest, baseline
from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import same_outputs, serve_live
from benchmarks.effects.serving import Load, Served, limits, serve, settings_of
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

KV_TOKENS = 20_000
KV_TOKENS_LONG = 24_000
QUANTILES = tuple(index / 50 for index in range(51))


def _served(preempt: str, load: Load, kv_tokens: int = KV_TOKENS) -> Served:
    return serve(load, settings_of(preempt=preempt), limits(kv_tokens))


def wins() -> Measured:
    """80 requests of 200 + 1200 tokens on Llama-3-8B and an H100, in KV for a sixth of them.

    Compared with the oldest yielding: it loses most, and nobody ends until the crowd has thinned.
    """
    load = Load([Request(f"r{index}", 200, 1200, 0.02 * index) for index in range(80)])
    with baseline("preempt", Oldest) as oldest:
        other = _served(oldest, load)
    ours = _served("youngest-recompute", load)
    runs = {"youngest-recompute": ours, "the oldest yields": other}
    chart = Chart(
        "Time from arrival to the last token",
        "seconds, by share of the requests",
        QUANTILES,
        [
            Series(name, f"s{index + 1}", np.quantile(served.values("e2e_s"), QUANTILES).tolist())
            for index, (name, served) in enumerate(runs.items())
        ],
        lambda x: f"{x:.0%}",
        lambda y: f"{y:.0f} s",
    )
    first = [f"r{index}" for index in range(20)]
    end_other, end = (float(each.values("e2e_s", first).mean()) for each in (other, ours))
    lost_other, lost = other.lost_tokens, ours.lost_tokens
    return Measured(
        f"the first 20 of 80 end after {end_other:.1f} → {end:.1f} s; "
        f"computed again {lost_other / 1000:.0f}k → {lost / 1000:.0f}k tokens",
        (
            Claim("end of the first quarter, oldest / youngest", end_other / end, low=1.8),
            Claim("tokens computed again, oldest / youngest", lost_other / lost, low=1.2),
        ),
        (chart,),
    )


def loses() -> Measured:
    """Long contexts come last, behind short ones that grow: the youngest has most to compute again.

    Compared with whoever has least, among those behind the needy one.
    """
    short = [Request(f"s{index}", 64, 900, 0.0) for index in range(20)]
    long = [Request(f"l{index}", 3000, 300, 0.5 + 0.3 * index) for index in range(6)]
    with baseline("preempt", Cheapest) as cheapest:
        other = _served(cheapest, Load([*short, *long]), KV_TOKENS_LONG)
    ours = _served("youngest-recompute", Load([*short, *long]), KV_TOKENS_LONG)
    lost_other, lost = other.lost_tokens, ours.lost_tokens
    return Measured(
        f"tokens computed again {lost_other / 1000:.1f}k → {lost / 1000:.1f}k",
        (Claim("tokens computed again, youngest / cheapest", lost / max(1, lost_other), low=1.2),),
    )


def live() -> Measured:
    """SmolLM2-135M: 16 requests of 64 + 160 tokens at once, in KV for a third of them."""
    load = Load([Request(f"r{index}", 64, 160, 0.01 * index) for index in range(16)])
    sizes = limits(1200)
    with baseline("preempt", Oldest) as oldest:
        other = serve_live(load, settings_of(preempt=oldest), sizes)
    ours = serve_live(load, settings_of(preempt="youngest-recompute"), sizes)
    first = [f"r{index}" for index in range(4)]
    end_other, end = (float(each.values("e2e_s", first).mean()) for each in (other, ours))
    return Measured(
        f"the first 4 of 16 end after {end_other:.1f} → {end:.1f} s; computed again "
        f"{other.lost_tokens} → {ours.lost_tokens} tokens; outputs identical",
        (
            Claim("end of the first quarter, oldest / youngest", end_other / end, low=1.3),
            same_outputs(ours, other),
        ),
    )


EFFECTS = (
    Effect(
        "preempt",
        "youngest-recompute",
        "who came first is never computed twice, and ends first (vLLM v1)",
        wins,
        loses,
        live,
    ),
)
