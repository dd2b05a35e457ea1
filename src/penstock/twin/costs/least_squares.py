"""Non-negative least squares, and a robust version of it. Pure; NumPy only."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ROUNDS_PER_COLUMN: Final = 6
_OUTLIER_SPREADS: Final = 1.5
_SPREAD_MIN: Final = 1e-3  # relative; steps are not timed better
OUTLIER_FACTOR: Final = 4.0  # a machine that was suspended tells nothing of the next run
_SHARE_MIN: Final = 0.1  # of a time, below which a prediction is no measure of its error


def nonnegative(matrix: Array, target: Array) -> Array:
    """The x >= 0 that minimises |matrix · x - target|.

    Active-set method of Lawson and Hanson ("Solving Least Squares Problems", 1974, chapter 23), on columns
    scaled to unit length. Bounded rounds: at worst the best feasible point so far is returned.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0.0] = 1.0
    scaled = matrix / lengths
    width = scaled.shape[1]
    solution = np.zeros(width)
    is_free = np.zeros(width, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(scaled.T @ target).max(initial=0.0)))
    for _ in range(_ROUNDS_PER_COLUMN * width):
        gradient = scaled.T @ (target - scaled @ solution)
        gradient[is_free] = -np.inf
        entering = int(np.argmax(gradient))
        if gradient[entering] <= tolerance:
            break
        is_free[entering] = True
        solution = _feasible(scaled, target, solution, is_free)
    return np.asarray(solution / lengths)


def _feasible(matrix: Array, target: Array, solution: Array, is_free: NDArray[np.bool_]) -> Array:
    """Solve over the free columns; walk back and pin columns until none is negative. Changes `is_free`."""
    while is_free.any():
        trial = np.zeros_like(solution)
        trial[is_free] = np.linalg.lstsq(matrix[:, is_free], target, rcond=None)[0]
        negative = is_free & (trial <= 0.0)
        if not negative.any():
            return trial
        steps = solution[negative] / np.maximum(solution[negative] - trial[negative], 1e-300)
        solution = solution + float(steps.min()) * (trial - solution)
        is_free &= solution > 1e-15
        solution[~is_free] = 0.0
    return np.zeros_like(solution)


def mean_nonnegative(matrix: Array, target: Array, rounds: int = 8) -> Array:
    """`nonnegative` with errors relative to the prediction, which makes it right on average.

    For times whose disturbances belong to them, because they will come again: the sum of many predictions
    should be the sum of many times. A single time counts as at most OUTLIER_FACTOR predictions. All targets
    must be positive.
    """
    assert (target > 0.0).all() and len(target) == len(matrix)
    predicted, solution = target, np.zeros(matrix.shape[1])
    for _ in range(rounds):
        limited = np.minimum(target, OUTLIER_FACTOR * predicted)
        solution = nonnegative(matrix / predicted[:, None], limited / predicted)
        predicted = np.maximum(matrix @ solution, _SHARE_MIN * target)
    return solution


def robust_nonnegative(matrix: Array, target: Array, rounds: int = 12) -> Array:
    """`nonnegative` on relative errors of times, where some are too long: a busy machine only ever slows.

    The spread is judged by the times below the fit, which no neighbour made. Beyond it, times below count
    less (Huber's weights), and times above much less (their square), so that a third of the steps may be
    stalled several-fold and still move the fit by little. All targets must be positive.
    """
    assert (target > 0.0).all() and len(target) == len(matrix)
    relative = matrix / target[:, None]
    weight = np.ones(len(target))
    solution = np.zeros(matrix.shape[1])
    for _ in range(rounds):
        root = np.sqrt(weight)
        solution = nonnegative(relative * root[:, None], root)
        excess = relative @ solution - 1.0  # above 0: faster than predicted
        faster = excess[excess > 0.0]
        spread = _OUTLIER_SPREADS * max(
            _SPREAD_MIN, float(np.median(faster)) / 0.6745 if faster.size else 0.0
        )
        weight = np.minimum(1.0, spread / np.maximum(np.abs(excess), 1e-12))
        weight = np.where(excess < 0.0, weight * weight, weight)
    return solution
