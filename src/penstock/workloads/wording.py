"""Numbers for people: short, with their unit, the same on the terminal and in the HTML report."""

from __future__ import annotations

import math

from penstock.core.metrics import Goodput, Slo


def milliseconds(value_ms: float) -> str:
    """`0.42 ms`, `37 ms`, `1.24 s`, `3.1 min`."""
    if value_ms < 9.995:
        return f"{value_ms:.2f}".rstrip("0").rstrip(".") + " ms"
    if value_ms < 999.5:
        return f"{value_ms:.0f} ms"
    if value_ms % 1000 == 0 and value_ms < 60_000:
        return f"{value_ms / 1e3:.0f} s"
    return f"{value_ms / 1e3:.2f} s" if value_ms < 99_950 else f"{value_ms / 60e3:.1f} min"


def seconds(value_s: float) -> str:
    """`45 s`, `2 min`, `1.5 h`, for axes."""
    if value_s < 180:
        return f"{round(value_s, 2):g} s"
    return f"{value_s / 60:.3g} min" if value_s < 7200 else f"{value_s / 3600:.3g} h"


def number(value: float) -> str:
    """Three significant digits, thousands as `12.3k`."""
    if not math.isfinite(value):
        return "-"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(fraction: float) -> str:
    """`97.3 %`; never rounded up to 100 %."""
    if fraction >= 1:
        return "100 %"
    return f"{math.floor(fraction * 1000 + 1e-9) / 10:g} %"


def attained(found: Goodput, measured: int) -> str:
    """`97.3 % of requests within their SLO; 20 have none`, of `measured` requests."""
    if not found.requests:
        return "no request has an SLO"
    without = measured - found.requests
    said = f"{percent(found.attained_frac)} of requests within their SLO"
    return f"{said}; {without} {'has' if without == 1 else 'have'} none" if without else said


def slo(target: Slo) -> str:
    """`TTFT ≤ 1 s, TPOT ≤ 100 ms`."""
    named = (("TTFT", target.ttft_ms), ("TPOT", target.tpot_ms), ("E2E", target.e2e_ms))
    return ", ".join(f"{name} ≤ {milliseconds(value)}" for name, value in named if value is not None)
