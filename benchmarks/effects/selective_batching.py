"""Orca's iteration-level scheduling: whole prompts beside decodes (a baseline of card sarathi-serve)."""

from __future__ import annotations

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.serving import Served, azure_lengths, limits, poisson, serve, settings_of
from penstock.workloads.charts import Chart, Series

QUANTILES = tuple(index / 200 for index in range(200))
REQUESTS = 600
RATE_RPS = 12.0


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


EFFECTS = (
    Effect(
        "compose",
        "selective-batching",
        "requests join a running batch at any iteration (Orca, OSDI 2022: baseline of card sarathi-serve)",
        selective_wins,
        selective_loses,
    ),
)
