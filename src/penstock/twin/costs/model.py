"""The protocol between the twin's executor and whatever knows the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.twin.costs.work import StepCost, StepWork

Seconds = Sequence[float] | NDArray[np.float64]

# Below this many steps a Python list is made faster than an array.
VECTOR_STEPS_MIN = 24


class CostModel(Protocol):
    """Time and energy of steps. Pure: equal work costs equal seconds, in any order of asking."""

    @property
    def relative_error(self) -> float:
        """Expected error of one step's seconds, as a fraction; the error bar of every prediction."""

    def seconds(self, work: StepWork) -> float:
        """The hot path: a few table look-ups and one multiplication a chunk."""

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Seconds:
        """Seconds of `steps` decode steps in a row, every one sampling from all `decodes`.

        The first has the context sum `decode_context`, each further one `decodes` more. Element i equals
        `seconds` of that step bit for bit, so a leap changes no result.
        """

    def step(self, work: StepWork) -> StepCost:
        """Everything about one step; ten times slower than `seconds`, which it agrees with."""


def decode_ramp(fixed_s: float, context_s: float, decodes: int, decode_context: int, steps: int) -> Seconds:
    """`fixed_s + context_s · context` for `steps` contexts, `decodes` apart. Pure.

    Multiplying and adding doubles rounds the same in an array as one by one, hence bit-for-bit.
    """
    assert steps >= 0
    if steps < VECTOR_STEPS_MIN:
        stop = decode_context + steps * decodes
        contexts = range(decode_context, stop, decodes) if decodes else [decode_context] * steps
        return [fixed_s + context_s * context for context in contexts]
    ramp = np.arange(steps, dtype=np.float64)
    ramp *= decodes
    ramp += decode_context
    ramp *= context_s
    ramp += fixed_s
    return ramp
