"""The question that a cost model answers, and its answer. Plain data; no cost is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Bound = Literal["compute", "memory", "overhead", "link"]


@dataclass(slots=True)
class StepWork:
    """One step of a replica, reduced to what its cost depends on.

    `prefills` holds (new tokens, context length after them) of each chunk; `decode_context` is the sum of
    the context lengths, after the step, of all `decodes`; `samples` counts the rows that are sampled from.
    """

    prefills: Sequence[tuple[int, int]]
    decodes: int
    decode_context: int
    samples: int

    @property
    def rows(self) -> int:
        """Tokens that pass through the linear layers."""
        return self.decodes + sum(new for new, _ in self.prefills)


@dataclass(slots=True)
class StepCost:
    """What a step costs, and what limits it.

    `bound` is the largest share of the step: arithmetic, memory traffic, fixed overheads (launches and host
    code), or links between devices. `joules` is of all devices of the replica. `in_range` is false when the
    step lies outside what the profile was calibrated on, so that a report can say so.
    """

    seconds: float
    bound: Bound
    joules: float
    flops: float
    bytes: float
    in_range: bool
