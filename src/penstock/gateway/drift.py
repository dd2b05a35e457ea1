"""How far a running server is from its own model: a moving mean of the model's error on its steps."""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.step_trace import StepRecord

PredictStep = Callable[[StepRecord], float]  # seconds that a step of this work should take

MEMORY_STEPS = 1000  # a step weighs 1/n among the first n, and 1/1000 from then on


class StepDrift:
    """`signed` and `absolute` are means of predicted / measured - 1; None before the first step.

    Signed says how far the model is off on the whole, below 0 where the machine is slower than it. Absolute
    says how far it is off on a single step, whichever way. Measured is `total_s`.
    """

    def __init__(self, predict_s: PredictStep) -> None:
        self._predict_s = predict_s
        self._steps = 0
        self.signed: float | None = None
        self.absolute: float | None = None

    def observe(self, record: StepRecord) -> None:
        """Take one step of the engine into the means."""
        if record.total_s <= 0.0:
            return  # a clock too coarse to measure it
        error = self._predict_s(record) / record.total_s - 1.0
        self._steps = min(self._steps + 1, MEMORY_STEPS)
        self.signed = _moved(self.signed, error, self._steps)
        self.absolute = _moved(self.absolute, abs(error), self._steps)


def _moved(mean: float | None, value: float, steps: int) -> float:
    return value if mean is None else mean + (value - mean) / steps
