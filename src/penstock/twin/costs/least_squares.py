"""Non-negative least squares, and a robust version of it. Pure; NumPy only."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ROUNDS_PER_COLUMN: Final = 6
_OUTLIER_SPREADS: Final = 2.5


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


def robust_nonnegative(matrix: Array, target: Array, rounds: int = 8) -> Array:
    """`nonnegative` on relative errors, with rows far from the fit counted less (Huber's weights).

    All targets must be positive. The spread is judged by the median, so that a fifth of wild rows, as a busy
    neighbour makes them, moves the fit little.
    """
    assert (target > 0.0).all() and len(target) == len(matrix)
    relative = matrix / target[:, None]
    weight = np.ones(len(target))
    solution = np.zeros(matrix.shape[1])
    for _ in range(rounds):
        root = np.sqrt(weight)
        solution = nonnegative(relative * root[:, None], root)
        residual = np.abs(relative @ solution - 1.0)
        spread = _OUTLIER_SPREADS * max(1e-4, float(np.median(residual)) / 0.6745)
        weight = np.minimum(1.0, spread / np.maximum(residual, 1e-12))
    return solution
