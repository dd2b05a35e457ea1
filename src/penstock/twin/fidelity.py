"""How far the twin is from the machine: the same rows replayed and simulated, error by metric. Pure.

An error is (twin − live) / live of the same statistic over the answered requests of each side, warm-up left
out: queue wait is part of TTFT and E2E, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from penstock import __version__
from penstock.core.errors import TraceError
from penstock.core.metrics import RequestOutcome
from penstock.workloads.trace import TraceRow

SCHEMA = "penstock-fidelity"
SCHEMA_VERSION = 1
METRICS = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99")
WARMUP_FRAC_MAX = 0.2
BURST_COUNTED_FRAC = 0.9  # the last of a burst leave the batch half empty


@dataclass(frozen=True, slots=True)
class Error:
    """One statistic of one metric, on both sides.

    `live_ms` is the mean over repeated replays, `spread_frac` how far the furthest of them is from it: no
    twin can be expected to be nearer than the machine is to itself. None: it was replayed once.
    """

    live_ms: float
    twin_ms: float
    spread_frac: float | None = None

    @property
    def frac(self) -> float:
        return (self.twin_ms - self.live_ms) / self.live_ms


@dataclass(frozen=True, slots=True)
class Regime:
    """One load. `errors` is by metric and statistic; a metric is absent where one side has no values."""

    load: float | None  # of the measured capacity; None: the rate was given
    rate_scale: float
    requested_rps: float
    requests: int
    live_answered: int
    twin_answered: int
    live_output_tokens_per_s: float
    twin_output_tokens_per_s: float
    lag_p99_ms: float | None  # how late the client itself sent
    out_of_range: int  # times a step went beyond what the profile was calibrated on
    errors: dict[str, dict[str, Error]]

    @property
    def name(self) -> str:
        return f"rate × {self.rate_scale:.3g}" if self.load is None else f"{self.load:.0%} of capacity"


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The whole result. `step_error_frac` is what the profile says of itself."""

    title: str
    profile: str
    step_error_frac: float
    capacity_rps: float | None
    regimes: list[Regime]
    configuration: dict[str, Any]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        for regime, found in zip(body["regimes"], self.regimes, strict=True):
            for metric, statistics in found.errors.items():
                for statistic, error in statistics.items():
                    regime["errors"][metric][statistic]["error_frac"] = error.frac
        return {"schema": SCHEMA, "version": SCHEMA_VERSION, "penstock_version": __version__} | body


def errors_between(
    lives: Sequence[Sequence[RequestOutcome]], twin: Sequence[RequestOutcome]
) -> dict[str, dict[str, Error]]:
    """Metric → statistic → both values. `lives`: one list a replay. Percentiles interpolate linearly."""
    found: dict[str, dict[str, Error]] = {}
    for metric in METRICS:
        replays = [_statistics_ms(_values_s(outcomes, metric)) for outcomes in lives]
        twin_ms = _statistics_ms(_values_s(twin, metric))
        if twin_ms and all(replays):
            columns = zip(STATISTICS, zip(*replays, strict=True), twin_ms, strict=True)
            found[metric] = {name: _error(live, twin) for name, live, twin in columns if min(live) > 0}
    return found


def _error(lives_ms: Sequence[float], twin_ms: float) -> Error:
    live_ms = sum(lives_ms) / len(lives_ms)
    spread = max(abs(each - live_ms) for each in lives_ms) / live_ms if len(lives_ms) > 1 else None
    return Error(live_ms, twin_ms, spread)


def _values_s(outcomes: Sequence[RequestOutcome], metric: str) -> list[float]:
    values = (getattr(outcome, f"{metric}_s") for outcome in outcomes if outcome.is_answered)
    return [value for value in values if value is not None]


def _statistics_ms(values_s: Sequence[float]) -> list[float]:
    """Parallel to STATISTICS; empty without values."""
    if not values_s:
        return []
    values_ms = np.array(values_s) * 1e3
    return [float(values_ms.mean()), *(float(value) for value in np.percentile(values_ms, (50, 90, 99)))]


def warmup_end_s(rows: Sequence[TraceRow], warmup_s: float) -> float:
    """Until when requests are left out: `warmup_s`, but never more than WARMUP_FRAC_MAX of the requests."""
    return min(warmup_s, rows[int(len(rows) * WARMUP_FRAC_MAX)].arrival_s)


def measured(outcomes: Sequence[RequestOutcome], warmup_s: float) -> list[RequestOutcome]:
    """Those that arrived after the warm-up."""
    return [outcome for outcome in outcomes if outcome.arrival_s >= warmup_s]


def output_rate(outcomes: Sequence[RequestOutcome]) -> float:
    """Output tokens per second, from the first arrival to the last finish; 0 without answers."""
    if not outcomes:
        return 0.0
    span_s = max(each.finish_s for each in outcomes) - min(each.arrival_s for each in outcomes)
    return sum(each.output_tokens for each in outcomes) / span_s if span_s > 0 else 0.0


def capacity_rps(burst: Sequence[RequestOutcome]) -> float:
    """Requests per second of a burst that was sent all at once at 0 s. Raises TraceError."""
    ends_s = sorted(outcome.finish_s for outcome in burst if outcome.is_answered)
    counted = int(len(ends_s) * BURST_COUNTED_FRAC)
    if counted < 1:
        codes = sorted({outcome.error_code or "unknown" for outcome in burst})
        raise TraceError(
            f"the capacity could not be measured: no request of the burst was answered ({', '.join(codes)}).",
            hint="look at the server's log, or give `--rate-scales` instead of `--loads`",
        )
    return counted / ends_s[counted - 1]


def trace_rps(rows: Sequence[TraceRow]) -> float:
    """Arrivals per second of rows in order. Raises TraceError where they span no time."""
    span_s = rows[-1].arrival_s - rows[0].arrival_s if rows else 0.0
    if span_s <= 0:
        raise TraceError(
            f"the trace's {len(rows)} requests span no time.", hint="take more rows, or `--spread-s`"
        )
    return (len(rows) - 1) / span_s


def at_rate(rows: Sequence[TraceRow], rate_scale: float) -> list[TraceRow]:
    """The rows at a multiple of their rate; a closed loop's think times are scaled back by whoever paces."""
    return [replace(row, arrival_s=row.arrival_s / rate_scale) for row in rows]


def markdown(fidelity: Fidelity) -> str:
    """A row a regime and metric: live → twin in milliseconds, and the error."""
    lines = ["| load | req/s | metric | " + " | ".join(STATISTICS) + " |"]
    lines.append("| --- | ---: | --- | " + " | ".join("---:" for _ in STATISTICS) + " |")
    for regime in fidelity.regimes:
        for metric, statistics in regime.errors.items():
            cells = [_cell(statistics.get(name)) for name in STATISTICS]
            head = f"| {regime.name} | {regime.requested_rps:.2f} | {metric.upper()} | "
            lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(error: Error | None) -> str:
    if error is None:
        return "-"
    spread = "" if error.spread_frac is None else f"; live ±{error.spread_frac:.1%}"
    return f"{_short_ms(error.live_ms)} → {_short_ms(error.twin_ms)} ({error.frac:+.1%}{spread})"


def _short_ms(value_ms: float) -> str:
    return f"{value_ms:.1f}" if value_ms < 100 else f"{value_ms:.0f}"
