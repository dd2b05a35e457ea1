"""Ends of requests as a gateway tells them, and a cost model for what is only counted."""

from __future__ import annotations

from typing import Any

from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.twin.costs.work import StepCost, StepWork

WAIT_S = 30.0  # how long a test waits for what must happen; never a bound on speed


class ConstantCost:
    """Every step takes 10 ms."""

    relative_error = 0.0

    def seconds(self, work: StepWork) -> float:
        return 0.01

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> list[float]:
        return [0.01] * steps

    def step(self, work: StepWork) -> StepCost:
        return StepCost(0.01, "overhead", 0.0, 0.0, 0.0, True)


def end(
    name: str,
    arrival_s: float,
    prompt: list[int],
    output: list[int],
    finish: FinishReason = FinishReason.STOP,
    **changes: Any,
) -> tuple[RequestOutcome, Request, list[int]]:
    request = Request(name, len(prompt), 100, arrival_s, prompt_tokens=prompt, **changes)
    first_s = arrival_s + 0.25 if output else None
    outcome = RequestOutcome(
        name,
        arrival_s,
        finish,
        arrival_s + 1.0,
        len(prompt),
        len(output),
        0,
        first_s,
        first_s and first_s + 0.5,
    )
    return outcome, request, output
