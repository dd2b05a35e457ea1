"""A budget in milliseconds: the gap stays at its target whatever decodes (card sarathi-serve, choosing τ)."""

from __future__ import annotations

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.serving import Load, Served, limits, serve, settings_of
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

TARGET_MS = 25.0
STATIC_TOKENS = (256, 320, 384, 448, 512)
CAP_TOKENS = 4096
TIGHT_MS = 5.0


def _load() -> Load:
    """A minute of change: short chats, then documents of 12,000 tokens beside them.

    Questions of 2,000 tokens come all the time, and their first tokens are what a budget is for.
    """
    draw = np.random.default_rng(5)
    chats = [Request(f"chat{i}", 512, 2500, 0.0) for i in range(8)]
    documents = [Request(f"document{i}", 12_000, 1200, 25.0 + 0.6 * i) for i in range(26)]
    at_s = np.cumsum(draw.exponential(1 / 5.0, size=250))
    questions = [Request(f"q{i}", 2000, 40, float(at)) for i, at in enumerate(at_s)]
    return Load(sorted([*chats, *documents, *questions], key=lambda request: request.arrival_s))


def _served(load: Load, compose: str, step_tokens: int, target_ms: float = TARGET_MS) -> Served:
    options = f"[policies.options.ms-budget]\ntarget_ms = {target_ms}\n" if compose == "ms-budget" else ""
    sizes = limits(400_000, step_tokens_max=step_tokens)
    return serve(load, settings_of(compose=compose, file=options), sizes)


def _p99_gap_ms(served: Served) -> float:
    return float(np.quantile(served.gaps_s(), 0.99)) * 1e3


def _ttft_ms(served: Served) -> float:
    questions = [name for name in served.outcomes if name.startswith("q")]
    return float(np.median(served.values("ttft_s", questions))) * 1e3


def wins() -> Measured:
    """Llama-3-8B on an H100, a target of 25 ms, against every static budget in steps of 64 tokens."""
    load = _load()
    static = {tokens: _served(load, "sarathi", tokens) for tokens in STATIC_TOKENS}
    gaps_ms = {tokens: _p99_gap_ms(served) for tokens, served in static.items()}
    best = max(tokens for tokens, gap_ms in gaps_ms.items() if gap_ms <= TARGET_MS)
    wide = max(STATIC_TOKENS)
    found = _served(load, "ms-budget", CAP_TOKENS)
    gap_ms, ttft_ms, static_ms = _p99_gap_ms(found), _ttft_ms(found), _ttft_ms(static[best])
    chart = Chart(
        "P99 gap between tokens, by the median TTFT that a budget leaves",
        f"milliseconds; static budgets of {min(STATIC_TOKENS)} to {wide} tokens, and {TARGET_MS:.0f} ms",
        [_ttft_ms(static[tokens]) for tokens in reversed(STATIC_TOKENS)],
        [
            Series("sarathi, static", "s2", [gaps_ms[tokens] for tokens in reversed(STATIC_TOKENS)]),
            Series("ms-budget", "s1", [gap_ms] * len(STATIC_TOKENS)),
        ],
        lambda x: f"{x:.0f} ms",
        lambda y: f"{y:.0f} ms",
    )
    return Measured(
        f"P99 gap {gap_ms:.1f} ms at a target of {TARGET_MS:.0f}; the best static budget that holds it is "
        f"{best} tokens: median TTFT {static_ms:.0f} → {ttft_ms:.0f} ms",
        (
            Claim("P99 gap / target", gap_ms / TARGET_MS, high=1.0),
            Claim("P99 gap of the widest static budget / target", gaps_ms[wide] / TARGET_MS, low=1.05),
            Claim("median TTFT, best static budget / this", static_ms / ttft_ms, low=1.5),
        ),
        (chart,),
    )


def loses() -> Measured:
    """A target below what a decode step takes by itself: prompts get their guaranteed crumbs."""
    load = Load([Request(f"q{i}", 1000, 60, 0.1 * i) for i in range(80)])
    spans_s = [
        _served(load, "sarathi", 512).makespan_s,
        _served(load, "ms-budget", CAP_TOKENS, TIGHT_MS).makespan_s,
    ]
    return Measured(
        f"80 requests take {spans_s[0]:.0f} → {spans_s[1]:.0f} s at a target of {TIGHT_MS:.0f} ms",
        (Claim("time for all, after / before", spans_s[1] / spans_s[0], low=1.3),),
    )


EFFECTS = (
    Effect(
        "compose",
        "ms-budget",
        "the gap stays at its target at any load, where a budget in tokens misses it or wastes time (ours; "
        "published is a budget chosen once, off line)",
        wins,
        loses,
    ),
)
