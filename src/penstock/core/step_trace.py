"""One record a step: what was computed, and how long it took. The same in engine and twin.

Fitting a cost model, comparing the twin with the machine, and watching for drift read these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One executed step, reduced to what its time depends on. Lengths are tokens.

    `prefills`: (new tokens, context length after them) of each chunk; `decode_context`: the sum of the
    context lengths, after the step, of the `decodes`; `samples`: rows that were sampled from.
    """

    prefills: tuple[tuple[int, int], ...]
    decodes: int
    decode_context: int
    samples: int
    seconds: float
