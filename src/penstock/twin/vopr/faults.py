"""Faults that wait for the engine's next step, and the cost model that they stretch."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.twin.costs.model import Seconds
from penstock.twin.costs.work import StepCost, StepWork
from penstock.twin.vopr.script import Fault, FaultKind, System

CONTEXT_TOKEN_S = 1e-6  # a little, so that no two steps of a run cost the same
LEAST_STEP_S = 1e-9


class FaultyCost:
    """A plain linear cost of a step, times `factor`. A `CostModel`.

    With `factor` 0 the clock stands still for an executor that computes; a modelled one, whose clock is made
    of costs, takes `LEAST_STEP_S` for a step.
    """

    relative_error = 0.0

    def __init__(self, system: System) -> None:
        self._base_s = system.step_base_s
        self._token_s = system.step_token_s
        self._least_s = 0.0 if system.exact else LEAST_STEP_S
        self.factor = 1.0

    def seconds(self, work: StepWork) -> float:
        rows_s = self._token_s * work.rows + CONTEXT_TOKEN_S * work.decode_context
        return max((self._base_s + rows_s) * self.factor, self._least_s)

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Seconds:
        works = (StepWork((), decodes, decode_context + i * decodes, decodes) for i in range(steps))
        return [self.seconds(work) for work in works]

    def step(self, work: StepWork) -> StepCost:
        return StepCost(self.seconds(work), "overhead", 0.0, 0.0, 0.0, True)


@dataclass(slots=True)
class StepFaults:
    """What hits the next step. Emptied when the step has taken it."""

    stall_s: float = 0.0
    error: Exception | None = None
    computes_first: bool = False

    @property
    def is_armed(self) -> bool:
        return self.stall_s > 0.0 or self.error is not None

    def arm(self, fault: Fault) -> None:
        if fault.kind is FaultKind.STALL:
            self.stall_s += fault.seconds
            return
        self.computes_first = fault.kind is FaultKind.CRASH_AFTER
        self.error = MemoryError() if fault.kind is FaultKind.MEMORY else RuntimeError("drawn")

    def take(self) -> StepFaults:
        """What is armed; from now on nothing is."""
        taken = StepFaults(self.stall_s, self.error, self.computes_first)
        self.stall_s, self.error, self.computes_first = 0.0, None, False
        return taken
