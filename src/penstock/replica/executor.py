"""What a replica asks of the thing that computes; engine and twin pass one contract test."""

from __future__ import annotations

from typing import Protocol

from penstock.core.step import StepPlan, StepResult


class Executor(Protocol):
    """Runs plans in order. It holds KV bytes for the block ids it is told, and knows nothing of policy."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan; a token for every emitting chunk and every decode that it advances."""
