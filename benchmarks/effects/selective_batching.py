"""Orca's iteration-level scheduling: whole prompts beside decodes (a baseline of card sarathi-serve)."""

from __future__ import annotations

from collections import Counter

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import serve_live
from benchmarks.effects.serving import Load, Served, azure_lengths, limits, poisson, serve, settings_of
from penstock.core.request import Request
from penstock.core.step import StepPlan
from penstock.workloads.charts import Chart, Series

QUANTILES = tuple(index / 200 for index in range(200))
REQUESTS = 600
RATE_RPS = 12.0
OPEN_DOOR = "[desk]\nqueue_requests_max = 65536\nqueue_wait_s_max = 1e6"


def _azure(compose: str, step_tokens: int) -> Served:
    sizes = limits(400_000, step_tokens_max=step_tokens, running_max=128)
    return serve(poisson(azure_lengths()[:REQUESTS], RATE_RPS), settings_of(compose=compose), sizes)


def _gap_ms(served: Served, quantile: float = 0.99) -> float:
    return float(np.quantile(served.gaps_s(), quantile)) * 1e3


def _gaps_chart(served: dict[str, Served]) -> Chart:
    return Chart(
        "Gaps between tokens",
        "milliseconds, by share of the gaps",
        QUANTILES,
        [
            Series(name, f"s{index + 1}", (np.quantile(each.gaps_s(), QUANTILES) * 1e3).tolist())
            for index, (name, each) in enumerate(served.items())
        ],
        lambda x: f"{x:.0%}",
        lambda y: f"{y:.0f} ms",
        y_is_log=True,
    )


def selective_wins() -> Measured:
    """Azure's conversations: a prompt no longer stops the streams, it travels with them."""
    first, mixed = _azure("prefill-first", 8192), _azure("selective-batching", 8192)
    tpot_before, tpot_after = (float(np.mean(each.values("tpot_s"))) * 1e3 for each in (first, mixed))
    return Measured(
        f"mean TPOT {tpot_before:.1f} → {tpot_after:.1f} ms against prefill-first; "
        f"P99 gap {_gap_ms(first):.0f} → {_gap_ms(mixed):.0f} ms",
        (
            Claim("mean TPOT, prefill-first / selective-batching", tpot_before / tpot_after, low=1.05),
            Claim("P99 gap, prefill-first / selective-batching", _gap_ms(first) / _gap_ms(mixed), low=1.0),
        ),
        (_gaps_chart({"selective-batching": mixed, "prefill-first": first}),),
    )


def selective_loses() -> Measured:
    """The same load: whole prompts still stretch the gaps of all, and pieces do not."""
    sarathi, mixed = _azure("sarathi", 512), _azure("selective-batching", 8192)
    before, after = _gap_ms(sarathi), _gap_ms(mixed)
    return Measured(
        f"P99 gap {before:.0f} → {after:.0f} ms against sarathi",
        (Claim("P99 gap, selective-batching / sarathi", after / before, low=2.0),),
    )


def live() -> Measured:
    """SmolLM2-135M: twelve streams of 120 tokens, and 110 prompts of 48 beside them, one after the other.

    A prompt has the thirteenth place for two tokens. So nearly every second step holds one, and only where it
    travels with the streams do they advance.
    """
    streams = [Request(f"s{index}", 32, 120, 0.0) for index in range(12)]
    prompts = [Request(f"p{index}", 48, 2, 0.0) for index in range(110)]
    load, sizes = Load([*streams, *prompts]), limits(8000, step_tokens_max=4096, running_max=13)
    stood_still: Counter[str] = Counter()  # steps without a decode, by policy
    served = {}
    for name in ("prefill-first", "selective-batching"):

        def look(replica: object, plan: StepPlan, *_: object, name: str = name) -> None:
            stood_still[name] += not plan.decode_count

        served[name] = serve_live(load, settings_of(compose=name, file=OPEN_DOOR), sizes, each_step=look)
    first, mixed = served.values()
    names = [request.id for request in streams]
    tpot_before, tpot_after = (float(np.mean(each.values("tpot_s", names))) * 1e3 for each in (first, mixed))
    unequal = sum(first.tokens[name] != mixed.tokens[name] for name in first.tokens)
    return Measured(
        f"steps in which the streams stood still {stood_still['prefill-first']} → "
        f"{stood_still['selective-batching']} against prefill-first; mean TPOT of the streams "
        f"{tpot_before:.0f} → {tpot_after:.0f} ms; outputs identical",
        (
            Claim("steps without a decode, prefill-first", stood_still["prefill-first"], low=100),
            Claim("the same, selective-batching", stood_still["selective-batching"], high=10),
            Claim("mean TPOT, prefill-first / selective-batching", tpot_before / tpot_after, low=1.1),
            Claim("outputs that differ", unequal, high=0),
        ),
    )


EFFECTS = (
    Effect(
        "compose",
        "selective-batching",
        "requests join a running batch at any iteration (Orca, OSDI 2022: baseline of card sarathi-serve)",
        selective_wins,
        selective_loses,
        live,
    ),
)
