"""How time to first token and time per token depend on a lane's share: two fits of a few observations.

    TTFT(x) = a / (x − λ) + b     prefill as an M/M/1 queue whose speed is its share, λ the share it needs
    TPOT(y) = a / y + b           decode joins at once, and works at the speed of its share

x and y are shares of what both lanes ask for together. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

POINTS_MIN: Final = 3  # different shares that a fit needs; with fewer, theory fills in
_SEARCH_STEPS: Final = 60
_NEVER: Final = float("inf")

Points = Sequence[tuple[float, float]]  # (share, seconds)


@dataclass(frozen=True, slots=True)
class QueueFit:
    """`seconds(share)` is infinite at and below the share that the load needs."""

    slope: float
    base_s: float
    needed: float

    def seconds(self, share: float) -> float:
        return _NEVER if share <= self.needed else self.slope / (share - self.needed) + self.base_s


@dataclass(frozen=True, slots=True)
class SpeedFit:
    slope: float
    base_s: float

    def seconds(self, share: float) -> float:
        return self.slope / share + self.base_s


def fit_queue(points: Points, needed: float, service_s: float) -> QueueFit:
    """Least squares: `needed` by 1-D search, then linear.

    With too few different shares it is theory: a = `service_s` (a request alone on the whole device) and
    `needed` = arrivals · `service_s`, and b is what the last observation leaves.
    """
    shares = {share for share, _ in points}
    if len(shares) < POINTS_MIN:
        share, seconds = points[-1]
        if share <= needed:
            return QueueFit(service_s, 0.0, needed)
        return QueueFit(service_s, max(0.0, seconds - service_s / (share - needed)), needed)
    top = min(shares)
    candidates = [top * step / _SEARCH_STEPS for step in range(_SEARCH_STEPS)]
    return min((_queue_at(points, each) for each in candidates), key=lambda fit: _squares(points, fit))


def _queue_at(points: Points, needed: float) -> QueueFit:
    slope, base_s = _line([(1.0 / (share - needed), seconds) for share, seconds in points])
    return QueueFit(slope, base_s, needed)


def fit_speed(points: Points) -> SpeedFit:
    """Least squares; with one share only, all of the time is taken to depend on it."""
    if len({share for share, _ in points}) < 2:
        share, seconds = points[-1]
        return SpeedFit(seconds * share, 0.0)
    slope, base_s = _line([(1.0 / share, seconds) for share, seconds in points])
    return SpeedFit(slope, base_s)


def r_squared(points: Points, fit: QueueFit | SpeedFit) -> float:
    """The part of the variance that the fit explains."""
    mean = sum(seconds for _, seconds in points) / len(points)
    total = sum((seconds - mean) ** 2 for _, seconds in points)
    return 1.0 - _squares(points, fit) / total if total else 1.0


def _squares(points: Points, fit: QueueFit | SpeedFit) -> float:
    return sum((fit.seconds(share) - seconds) ** 2 for share, seconds in points)


def _line(points: Points) -> tuple[float, float]:
    """Slope at least 0, and intercept, of the least-squares line."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread <= 0.0:
        return 0.0, mean_y
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)
    return slope, mean_y - slope * mean_x
