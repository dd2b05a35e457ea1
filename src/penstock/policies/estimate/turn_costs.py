"""What a program pays when its turn finds no KV: the prompt computed again, and the wait for room."""

from __future__ import annotations

from typing import Final

from penstock.core.reasons import FinishReason
from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.estimate.programs import Programs
from penstock.policies.view import SequenceView, StepFacts

WEIGHT: Final = 1 / 32  # of the newest observation in each mean


class TurnCosts(Observer):
    """Running means, in seconds, of what has been seen. O(1) an event; bounded by what waits."""

    def __init__(self, context: Context) -> None:
        self._programs = context.shared(Programs)
        self._prompt_step = _Mean()  # seconds of a step with prompts, per prompt token
        self._tokens = _Mean()  # prompt tokens of such a step
        self._decode_step = _Mean()  # seconds of a step without
        self._delay = _Mean()  # queue wait of turns that came back to no pin
        self._unpinned: set[int] = set()  # such turns that wait, by arrival index
        self._ended_s = 0.0  # of the last step
        self._run_began_s = 0.0
        self._run_steps = 0  # decode steps in a row, up to the last step

    def reload_s(self, tokens: int) -> float:
        """How long `tokens` of a prompt take to get KV again; 0 before any prompt was computed."""
        return self._prompt_step.value * tokens

    def reload_device_s(self, tokens: int) -> float:
        """Of that, what the decodes in the same steps would not have taken anyway."""
        decode_share_s = self._decode_step.value / self._tokens.value if self._tokens.value else 0.0
        return max(0.0, self._prompt_step.value - decode_share_s) * tokens

    @property
    def queue_delay_s(self) -> float:
        """How long a turn that returns to no pin waits until it starts; 0 before any was seen."""
        return self._delay.value

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        program = self._programs.of(sequence)
        if program is not None and program.gap_s is not None and not program.is_pinned:
            self._unpinned.add(sequence.arrival_index)

    def started(self, sequence: SequenceView, now_s: float) -> None:
        if sequence.arrival_index in self._unpinned:
            self._unpinned.remove(sequence.arrival_index)
            self._delay.add(now_s - sequence.submitted_s)

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        self._unpinned.discard(sequence.arrival_index)

    def stepped(self, step: StepFacts, now_s: float) -> None:
        """A run of decode steps is taken by its ends, so that leaps and single steps come out the same."""
        tokens = sum(count for count, _ in step.prefills)
        if tokens:
            if self._run_steps:
                self._decode_step.add(self._ended_s - self._run_began_s, self._run_steps)
                self._run_steps = 0
            self._prompt_step.add(step.seconds, tokens)
            self._tokens.add(tokens)
        else:
            if not self._run_steps:
                self._run_began_s = self._ended_s
            self._run_steps += step.steps
        self._ended_s = now_s


class _Mean:
    """An exponentially weighted ratio of sums; exact from the first observation on."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0

    def add(self, amount: float, weight: float = 1.0) -> None:
        """`amount` is a sum over `weight` observations."""
        self._sum += WEIGHT * (amount - self._sum)
        self._weight += WEIGHT * (weight - self._weight)
