"""The largest KV that a batch will hold, when every sequence's remaining output is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def future_peak(held: Ints, left: Ints) -> Ints:
    """Tokens int64[k] at the peak of k scenarios. Exact; the order of sequences does not matter.

    `held` int64[n]: tokens that each holds now. `left` int64[k, n]: tokens that each still produces, one a
    step, all together. Memory peaks just before somebody ends. When the one with b left ends, those with at
    least b left are alive, and each has grown by b: with the sequences sorted by b, falling, and A the
    running sum of what they hold, the peak is the largest A_i + i b_i. Source: past-future
    scheduler. O(k n log n).
    """
    scenarios, count = left.shape
    if count == 0:
        return np.zeros(scenarios, np.int64)
    order = np.argsort(-left, axis=1)
    falling = np.take_along_axis(left, order, axis=1)
    peaks: Ints = (np.cumsum(held[order], axis=1) + falling * np.arange(1, count + 1)).max(axis=1)
    return peaks


def shared_future_peak(held: Ints, left: Ints, found: Ints, roots: Ints, surplus: int) -> Ints:
    """`future_peak` where some tokens are held by several sequences, and counted once.

    `found` int64[n]: tokens of each that others held already when it started. `roots` int64[n]: equal for
    sequences that begin alike. `surplus`: tokens in the sum of `held` that are there twice or more, now.

    Whoever of one root stays longest is charged for what they share, the others for their own. This is
    exact where all of a root share the same prefix; where they share in more stages the credits may not add
    up to more than the surplus, so that the present is exact.
    """
    order = np.argsort(-left, axis=1, kind="stable")
    falling = np.take_along_axis(left, order, axis=1)
    charged = held[order] - np.stack([_credits(found[row], roots[row], surplus) for row in order])
    ranks = np.arange(1, held.size + 1)
    peaks = (np.cumsum(charged, axis=1) + falling * ranks).max(axis=1)
    rounded: Ints = np.ceil(peaks - 1e-6).astype(np.int64)
    return rounded


def _credits(found: Ints, roots: Ints, surplus: int) -> NDArray[np.float64]:
    """Tokens that each, in order of leaving, last first, need not be charged for."""
    _, firsts, group = np.unique(roots, return_index=True, return_inverse=True)
    # Who started first found nothing, and shares what the one that stays longest found.
    credits = np.where(found == 0, found[firsts][group], found).astype(np.float64)
    credits[firsts] = 0.0
    total = credits.sum()
    return credits * (surplus / total) if total > surplus else credits
