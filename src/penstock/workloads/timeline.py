"""Arrivals, answers, losses, output and TTFT over the time of a run, in at most BUCKETS_MAX buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.metrics import RequestOutcome

BUCKETS_MAX = 240
_WIDTHS_S = (0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)
_STREAM_POINTS_MAX = 64  # an answer whose gaps are unknown is spread over so many points

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bucket i covers [t_s[i], t_s[i] + bucket_s). TTFT percentiles are of the arrivals in the bucket."""

    bucket_s: float
    t_s: list[float]
    arrivals_per_s: list[float]
    answered_per_s: list[float]
    lost_per_s: list[float]
    output_tokens_per_s: list[float]
    ttft_ms_p50: list[float | None]
    ttft_ms_p95: list[float | None]


def timeline_of(outcomes: Sequence[RequestOutcome]) -> Timeline:
    """Pure. Warm-up and interrupted requests are shown too."""
    end_s = max((outcome.finish_s for outcome in outcomes), default=0.0)
    width_s = bucket_width_s(end_s)
    count = int(end_s // width_s) + 1 if outcomes else 0
    answered = [outcome for outcome in outcomes if outcome.is_answered]
    lost = [outcome for outcome in outcomes if not outcome.is_answered]

    def rate(instants_s: Floats, weights: Floats | None = None) -> list[float]:
        bins = np.clip(instants_s // width_s, 0, max(0, count - 1)).astype(np.int64)
        totals = np.bincount(bins, weights=weights, minlength=count)[:count]
        return [float(value) for value in totals / width_s]

    times_s, tokens = _output_instants(outcomes)
    p50, p95 = _ttft_percentiles(answered, width_s, count)
    return Timeline(
        bucket_s=width_s,
        t_s=[index * width_s for index in range(count)],
        arrivals_per_s=rate(np.array([outcome.arrival_s for outcome in outcomes])),
        answered_per_s=rate(np.array([outcome.finish_s for outcome in answered])),
        lost_per_s=rate(np.array([outcome.finish_s for outcome in lost])),
        output_tokens_per_s=rate(times_s, tokens),
        ttft_ms_p50=p50,
        ttft_ms_p95=p95,
    )


def bucket_width_s(end_s: float) -> float:
    """The smallest round width that needs at most BUCKETS_MAX buckets, aiming at about 80."""
    wanted_s = end_s / 80
    for width_s in _WIDTHS_S:
        if width_s >= wanted_s:
            return float(width_s)
    return max(float(_WIDTHS_S[-1]), end_s / (BUCKETS_MAX - 1))


def _output_instants(outcomes: Sequence[RequestOutcome]) -> tuple[Floats, Floats]:
    """Instants of output, and how many tokens each stands for."""
    times: list[Floats] = [np.array([])]
    weights: list[Floats] = [np.array([])]
    for outcome in outcomes:
        if outcome.first_token_s is None or not outcome.output_tokens:
            continue
        if len(outcome.itl_s):
            gaps = np.concatenate([[0.0], np.asarray(outcome.itl_s, dtype=np.float64)])
            instants = outcome.first_token_s + np.cumsum(gaps)
        else:
            last_s = outcome.first_token_s if outcome.last_token_s is None else outcome.last_token_s
            points = min(outcome.output_tokens, _STREAM_POINTS_MAX)
            instants = np.linspace(outcome.first_token_s, last_s, points)
        times.append(instants)
        weights.append(np.full(len(instants), outcome.output_tokens / len(instants)))
    return np.concatenate(times), np.concatenate(weights)


def _ttft_percentiles(
    answered: Sequence[RequestOutcome], width_s: float, count: int
) -> tuple[list[float | None], list[float | None]]:
    buckets: list[list[float]] = [[] for _ in range(count)]
    for outcome in answered:
        if outcome.ttft_s is not None:
            index = min(count - 1, max(0, int(outcome.arrival_s // width_s)))
            buckets[index].append(outcome.ttft_s * 1e3)
    p50 = [float(np.percentile(values, 50)) if values else None for values in buckets]
    p95 = [float(np.percentile(values, 95)) if values else None for values in buckets]
    return p50, p95
