"""How long this replica's steps take, learned from its own steps."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from penstock.core.reasons import FinishReason
from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.view import SequenceView, StepFacts

Array = NDArray[np.float64]

# A step's time bends where its arithmetic outgrows the reading of the weights, hence a slope for each range.
ROW_BENDS: Final = (64, 256, 1024)
BUCKET_SAMPLES: Final = 12
READY_SAMPLES: Final = 16  # of these so many with prompts:
READY_PREFILLS: Final = 4
REFIT_SAMPLES: Final = 16
NEW_SAMPLES: Final = 2  # a size of step that was seen no oftener is new, and a miss there counts at once
ROBUST_ROUNDS: Final = 3
TRUSTED_ERROR: Final = 0.15  # relative; what misses by more counts less, in proportion


class StepTimes(Observer):
    """Predicts the seconds of a step from what is in it; knows nothing before it has seen enough.

        seconds = base + Σ slope_i · rows beyond bend i + a · samples + b · decode context + c · chunk pairs

    No coefficient is negative. Fitted by least squares of the relative error, robustly: a hiccup of the
    machine counts little. Samples are kept by size of step, a few of each (a ring), so that a long stretch of
    equal steps does not push out what was learned of others. O(1) memory; a fit of some 200 samples, under a
    millisecond, every 16, and after a miss at a size of step that is new.

    A sample is a step with prompts, or a stretch of decode steps in a row, by its mean. Its time is that
    between the ends of steps, which is what a client sees as a gap: what the host does in between is part of
    it. So the samples are the same, bit for bit, whether decode steps are told one by one or as a leap.
    """

    def __init__(self, context: Context) -> None:
        self._inside = 0
        self._ended_s: float | None = None  # of the last step; None where the replica was idle since
        self._emitted = 0  # prompts that ended in the step which is being told
        self._run = _DecodeRun()
        self._buckets: dict[tuple[bool, int], deque[list[float]]] = {}
        self._prefills_seen = 0
        self._samples_seen = 0
        self._coefficients: tuple[float, ...] | None = None
        self.rows_seen = 0  # of the largest step so far

    @property
    def is_ready(self) -> bool:
        return self._coefficients is not None

    def seconds(self, rows: int, samples: int, decode_context: float, pairs: float) -> float:
        """Of a step of `rows` tokens, decodes among them; `pairs` as of `chunk_pairs`. If `is_ready`."""
        assert self._coefficients is not None, "ask `is_ready` first"
        features = step_features(rows, samples, decode_context, pairs)
        return sum(weight * value for weight, value in zip(self._coefficients, features, strict=True))

    # ---- what happens ---------------------------------------------------------------------------------

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        if not self._inside:
            self._ended_s = None
        self._inside += 1

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        self._inside -= 1

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        self._emitted += 1

    def stepped(self, step: StepFacts, now_s: float) -> None:
        began_s = now_s - step.seconds if self._ended_s is None else self._ended_s
        if step.prefills or self._run.decodes != step.decodes:
            self._close_run()
        if step.prefills:
            rows = step.decodes + sum(new for new, _ in step.prefills)
            pairs = sum(chunk_pairs(new, context) for new, context in step.prefills)
            samples = step.decodes + self._emitted
            seconds = step.seconds if self._ended_s is None else now_s - began_s
            self._add(True, rows, samples, step.decode_context, pairs, seconds)
        else:
            self._run.add(step, began_s, now_s)
        self._emitted = 0
        self._ended_s = now_s

    def _close_run(self) -> None:
        run, self._run = self._run, _DecodeRun()
        if run.steps:
            context, seconds = run.context / run.steps, (run.ended_s - run.began_s) / run.steps
            self._add(False, run.decodes, run.decodes, context, 0.0, seconds)

    def _add(
        self, is_mixed: bool, rows: int, samples: int, context: float, pairs: float, seconds: float
    ) -> None:
        if seconds <= 0.0:
            return
        bucket = self._buckets.setdefault((is_mixed, rows.bit_length()), deque(maxlen=BUCKET_SAMPLES))
        bucket.append([*step_features(rows, samples, context, pairs), seconds])
        self.rows_seen = max(self.rows_seen, rows)
        self._prefills_seen += is_mixed
        self._samples_seen += 1
        if self._samples_seen < READY_SAMPLES or self._prefills_seen < READY_PREFILLS:
            return
        is_new = self._coefficients is None or (
            len(bucket) <= NEW_SAMPLES
            and abs(self.seconds(rows, samples, context, pairs) / seconds - 1.0) > TRUSTED_ERROR
        )
        if is_new or self._samples_seen % REFIT_SAMPLES == 0:
            table = np.array([row for bucket in self._buckets.values() for row in bucket])
            self._coefficients = tuple(float(value) for value in fit(table[:, :-1], table[:, -1]))


class _DecodeRun:
    """Decode steps in a row, equally many decodes each: sums of whole numbers, and two instants."""

    __slots__ = ("began_s", "context", "decodes", "ended_s", "steps")

    def __init__(self) -> None:
        self.decodes = 0
        self.steps = 0
        self.context = 0  # summed over the steps
        self.began_s = self.ended_s = 0.0

    def add(self, step: StepFacts, began_s: float, ended_s: float) -> None:
        if not self.steps:
            self.decodes, self.began_s = step.decodes, began_s
        self.context += step.steps * step.decode_context + step.decodes * (step.steps * (step.steps - 1) // 2)
        self.steps += step.steps
        self.ended_s = ended_s


def chunk_pairs(new: int, context: int) -> float:
    """(query, key) pairs of `new` tokens that end a context of `context`, under the causal mask."""
    return new * context - new * (new - 1) / 2


def step_features(rows: int, samples: int, decode_context: float, pairs: float) -> list[float]:
    """What a step's seconds are linear in, in thousands, so that the numbers are of similar size."""
    bends = [max(0, rows - bend) / 1e3 for bend in ROW_BENDS]
    return [1.0, rows / 1e3, *bends, samples / 1e3, decode_context / 1e6, pairs / 1e6]


def fit(features: Array, seconds: Array) -> Array:
    """Coefficients, none negative, of the least relative error; [n, k] and [n] to [k]."""
    relative = features / seconds[:, None]
    weights = np.ones(len(seconds))
    found = np.zeros(features.shape[1])
    for _ in range(ROBUST_ROUNDS):
        weighted = relative * weights[:, None]
        found = nonnegative_solution(weighted.T @ relative, weighted.sum(axis=0))
        error = np.abs(relative @ found - 1.0)
        weights = np.minimum(1.0, TRUSTED_ERROR / np.maximum(error, 1e-12))
    return found


def nonnegative_solution(gram: Array, moments: Array) -> Array:
    """The x >= 0 of least xᵀ·gram·x / 2 - moments·x (Lawson and Hanson's active set, on normal equations)."""
    size = len(moments)
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    gram, moments = gram / np.outer(scale, scale) + 1e-9 * np.eye(size), moments / scale
    found, free = np.zeros(size), np.zeros(size, dtype=bool)
    for _ in range(3 * size):
        gradient = np.where(free, -np.inf, moments - gram @ found)
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10:
            break
        free[best] = True
        _solve_free(gram, moments, found, free)
    return found / scale


def _solve_free(gram: Array, moments: Array, found: Array, free: NDArray[Any]) -> None:
    """Move to the best point in the free coordinates; whichever would turn negative stops at 0. In place."""
    while free.any():
        wanted = np.zeros_like(found)
        wanted[free] = np.linalg.solve(gram[np.ix_(free, free)], moments[free])
        if (wanted[free] > 0.0).all():
            found[:] = wanted
            return
        stuck = free & (wanted <= 0.0)
        step = float(np.min(found[stuck] / (found[stuck] - wanted[stuck] + 1e-300)))
        found += step * (wanted - found)
        free &= found > 1e-15
        found[~free] = 0.0
