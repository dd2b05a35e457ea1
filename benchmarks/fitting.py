"""Robust least squares in few parameters, for operator fits. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
OUTLIER = 0.1  # log-residuals beyond count linearly: kernels switch algorithm at single points


@dataclass(frozen=True)
class Parameter:
    """A positive parameter with bounds; searched as a logit between their logarithms."""

    name: str
    start: float
    low: float
    high: float

    def inward(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        share = min(max(share, 1e-6), 1 - 1e-6)
        return math.log(share / (1 - share))

    def outward(self, inner: float) -> float:
        share = 1.0 / (1.0 + math.exp(-max(-40.0, min(40.0, inner))))
        return self.low * (self.high / self.low) ** share


def fit(
    parameters: Sequence[Parameter],
    predict: Callable[[dict[str, float]], Sequence[float]],
    measured: Sequence[float],
    iterations: int = 60,
) -> dict[str, float]:
    """Minimise the Huber loss of log(predicted / measured) by Levenberg-Marquardt. Deterministic."""
    target = np.log(np.asarray(measured, dtype=np.float64))

    def residual(inner: Vector) -> Vector:
        values = {p.name: p.outward(x) for p, x in zip(parameters, inner, strict=True)}
        return np.asarray(np.log(np.asarray(predict(values))) - target)

    point = np.array([p.inward(p.start) for p in parameters])
    current = residual(point)
    damping = 1e-2
    for _ in range(iterations):
        step = _step(residual, point, current, damping)
        if step is None:
            break
        gain = _loss(current) - _loss(step[1])
        point, current, damping = step
        if gain < 1e-7 * _loss(current):
            break
    return {p.name: p.outward(x) for p, x in zip(parameters, point, strict=True)}


def _step(
    residual: Callable[[Vector], Vector], point: Vector, current: Vector, damping: float
) -> tuple[Vector, Vector, float] | None:
    """One accepted step: the new point, its residuals and the next damping. None at the optimum."""
    nudge = 1e-4
    columns = [(residual(point + nudge * unit) - current) / nudge for unit in np.eye(len(point))]
    jacobian = np.stack(columns, axis=1)
    weight = np.minimum(1.0, OUTLIER / np.maximum(np.abs(current), 1e-12))
    normal = jacobian.T @ (jacobian * weight[:, None])
    gradient = jacobian.T @ (weight * current)
    for _ in range(14):
        change = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -gradient)
        moved = point + np.clip(change, -2.0, 2.0)
        after = residual(moved)
        if _loss(after) < _loss(current):
            return moved, after, max(damping / 5.0, 1e-9)
        damping *= 4.0
    return None


def _loss(residuals: Vector) -> float:
    size = np.abs(residuals)
    return float(np.sum(np.where(size < OUTLIER, size * size, 2.0 * OUTLIER * size - OUTLIER * OUTLIER)))


@dataclass(frozen=True)
class Errors:
    """Relative errors of predictions, as fractions."""

    median: float
    p90: float
    worst: float
    points: int


def errors(predicted: Sequence[float], measured: Sequence[float]) -> Errors:
    relative = np.abs(np.asarray(predicted) / np.asarray(measured) - 1.0)
    median, p90 = np.quantile(relative, [0.5, 0.9])
    return Errors(float(median), float(p90), float(relative.max()), len(relative))
