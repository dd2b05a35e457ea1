"""What a replica of the twin looks like over virtual time: the series that a live server's `/metrics` gives.

Memory is bounded: when a series is full, every other point is dropped and the interval doubles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.workloads.server_metrics import ServerSeries

INTERVAL_S = 0.05  # at first
POINTS_MAX = 1024  # of one replica
POINTS_OF_FLEET_MAX = 1 << 16
POINTS_SHOWN = 480

Floats = npt.NDArray[np.float64]


class Sampler:
    """Keeps samples at least an interval apart. The owner looks at `due_s` and calls `take`."""

    def __init__(self, points_max: int = POINTS_MAX) -> None:
        assert points_max >= 8
        self.series = ServerSeries()
        self.due_s = 0.0
        self._points_max = points_max
        self._interval_s = INTERVAL_S

    def take(self, now_s: float, running: int, waiting: int, kv_frac: float) -> None:
        series = self.series
        series.append(now_s, running, waiting, kv_frac)
        if len(series.t_s) >= self._points_max:
            series.halve()
            self._interval_s *= 2
        self.due_s = now_s + self._interval_s


def points_each(replicas: int) -> int:
    """How many points each of so many replicas may keep."""
    return max(16, min(POINTS_MAX, POINTS_OF_FLEET_MAX // replicas))


def fleet_series(parts: Sequence[ServerSeries], counters: dict[str, float]) -> ServerSeries:
    """One series of all replicas: requests added up, KV use averaged. Between samples the last one stands."""
    end_s = max((part.t_s[-1] for part in parts if part.t_s), default=0.0)
    grid = np.linspace(0.0, end_s, POINTS_SHOWN)
    running, waiting, kv_frac = (np.zeros(POINTS_SHOWN) for _ in range(3))
    for part in parts:
        if part.t_s:
            running += resampled(part.t_s, part.running, grid)
            waiting += resampled(part.t_s, part.waiting, grid)
            kv_frac += resampled(part.t_s, part.kv_usage_frac, grid) / len(parts)
    return ServerSeries(
        grid.tolist(),
        list(map(float, running)),
        list(map(float, waiting)),
        list(map(float, kv_frac)),
        counters,
    )


def resampled(t_s: Sequence[float], values: Sequence[float | None], grid: Floats) -> Floats:
    """The value of the latest sample at each instant of `grid`; 0 before the first. Pure."""
    known = np.array([0.0, *(0.0 if value is None else value for value in values)])
    found: Floats = known[np.searchsorted(np.array(t_s), grid, side="right")]
    return found
