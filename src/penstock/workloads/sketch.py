"""Numbers about a stream in bounded memory: exact counts of small integers, and quantiles within 0.5 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_GROWTH = 1.01  # ratio of neighbouring bin edges: a quantile is off by at most half of it
_SMALLEST = 1e-7
_BINS = math.ceil(math.log(1e12 / _SMALLEST) / math.log(_GROWTH))


@dataclass(slots=True)
class Moments:
    """Count, mean and variance of a stream, merged chunk by chunk (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def add(self, values: Floats) -> None:
        if not len(values):
            return
        chunk_mean = float(values.mean())
        chunk_squares = float(np.square(values - chunk_mean).sum())
        total = self.count + len(values)
        delta = chunk_mean - self.mean
        self.squares += chunk_squares + delta * delta * self.count * len(values) / total
        self.mean += delta * len(values) / total
        self.count = total

    @property
    def variance(self) -> float:
        """Population variance."""
        return self.squares / self.count if self.count else 0.0

    @property
    def cv(self) -> float | None:
        """Standard deviation over mean; None without two values or with mean 0."""
        return math.sqrt(self.variance) / self.mean if self.count > 1 and self.mean > 0 else None


class LengthCounts:
    """How often each length occurred: exact percentiles; memory grows with the longest length only."""

    def __init__(self) -> None:
        self._counts: Integers = np.zeros(4096, dtype=np.int64)

    def add(self, lengths: Integers) -> None:
        """`lengths` are non-negative and bounded by the readers."""
        counts = np.bincount(lengths)
        if len(counts) > len(self._counts):
            self._counts = np.pad(self._counts, (0, 2 * len(counts) - len(self._counts)))
        self._counts[: len(counts)] += counts

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def percentiles(self, percents: Sequence[float]) -> list[float]:
        """Linear interpolation between order statistics, as `numpy.percentile`. At least one value needed."""
        cumulative = np.cumsum(self._counts)
        ranks = np.asarray(percents) / 100 * (cumulative[-1] - 1)
        lower = np.searchsorted(cumulative, np.floor(ranks), side="right")
        upper = np.searchsorted(cumulative, np.ceil(ranks), side="right")
        return [float(value) for value in lower + (upper - lower) * (ranks - np.floor(ranks))]

    @property
    def largest(self) -> int:
        return int(np.flatnonzero(self._counts)[-1])

    @property
    def mean(self) -> float:
        return float(np.dot(np.arange(len(self._counts)), self._counts) / self._counts.sum())


class QuantileSketch:
    """Quantiles of non-negative values in logarithmic bins 1 % wide; memory is constant (about 35 KB)."""

    def __init__(self) -> None:
        self._bins: Integers = np.zeros(_BINS + 1, dtype=np.int64)
        self._pending: list[float] = []
        self._moments = Moments()
        self._largest = 0.0

    @property
    def count(self) -> int:
        return self._moments.count + len(self._pending)

    def add_one(self, value: float) -> None:
        """Amortised: single values are gathered and binned together."""
        self._pending.append(value)
        if len(self._pending) >= 4096:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        self.add(np.array(pending))

    def add(self, values: Floats) -> None:
        """Bin 0 holds what is smaller than 1e-7, the last bin what is larger than 1e12."""
        if not len(values):
            return
        scaled = np.log(np.maximum(values, _SMALLEST) / _SMALLEST) / math.log(_GROWTH)
        index = np.clip(np.ceil(scaled), 0, _BINS).astype(np.int64)
        self._bins += np.bincount(index, minlength=_BINS + 1)
        self._moments.add(values)
        self._largest = max(self._largest, float(values.max()))

    def quantile(self, fraction: float) -> float:
        """The value at that rank, within 0.5 %. At least one value needed."""
        self._flush()
        rank = math.floor(fraction * (self.count - 1))
        index = int(np.searchsorted(np.cumsum(self._bins), rank, side="right"))
        return 0.0 if index == 0 else min(self._largest, _SMALLEST * _GROWTH ** (index - 0.5))
