"""One record a step: what was computed, and how long it took. The same in engine and twin.

Fitting a cost model, comparing the twin with the machine, and watching for drift read these.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT = "penstock-step-trace"
VERSION = 1


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step takes beside the executor. `ended_s` is an instant on the engine's monotonic clock.

    `schedule_s`: the replica's planning and accounting. `between_s`: from the end of the step before until
    planning, where the replica had work all the while: reporting, the inbox.
    """

    schedule_s: float
    between_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One executed step, reduced to what its time depends on. Lengths are tokens.

    `prefills`: (new tokens, context length after them) of each chunk; `decode_context`: the sum of the
    context lengths, after the step, of the `decodes`; `samples`: rows that were sampled from; `seconds`: the
    executor's. The last three are those of `StepTimes`.
    """

    prefills: tuple[tuple[int, int], ...]
    decodes: int
    decode_context: int
    samples: int
    seconds: float
    schedule_s: float = 0.0
    between_s: float = 0.0
    ended_s: float = 0.0

    @property
    def total_s(self) -> float:
        """What the step kept the replica busy for: computing, deciding, and telling."""
        return self.seconds + self.schedule_s + self.between_s


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
        "between_s": round(record.between_s, 7),
    }
