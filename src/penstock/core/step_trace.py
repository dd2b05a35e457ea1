"""One record a step: what was computed, and how long it took. The same in engine and twin.

Fitting a cost model, comparing the twin with the machine, and watching for drift read these.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT = "penstock-step-trace"
VERSION = 1


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One executed step, reduced to what its time depends on. Lengths are tokens.

    `prefills`: (new tokens, context length after them) of each chunk; `decode_context`: the sum of the
    context lengths, after the step, of the `decodes`; `samples`: rows that were sampled from; `seconds`: the
    executor's; `schedule_s`: the replica's, beside them. `ended_s` is on the engine's monotonic clock.
    """

    prefills: tuple[tuple[int, int], ...]
    decodes: int
    decode_context: int
    samples: int
    seconds: float
    schedule_s: float = 0.0
    ended_s: float = 0.0

    @property
    def total_s(self) -> float:
        """What the step kept the replica busy for: deciding and computing."""
        return self.seconds + self.schedule_s


def header() -> dict[str, object]:
    """The first line of a step trace."""
    return {"format": FORMAT, "version": VERSION}


def line_of(record: StepRecord) -> dict[str, object]:
    """The record as one line of a step trace. Pure."""
    return {
        "ended_s": round(record.ended_s, 6),
        "prefills": [list(chunk) for chunk in record.prefills],
        "decodes": record.decodes,
        "decode_context": record.decode_context,
        "samples": record.samples,
        "seconds": round(record.seconds, 7),
        "schedule_s": round(record.schedule_s, 7),
    }
