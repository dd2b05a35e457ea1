"""Which program each request is a turn of, and where its programs stand."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from penstock.core.reasons import FinishReason, PinEvent
from penstock.core.request import ProgramKey
from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.view import SequenceView

PROGRAMS_MAX: Final = 100_000  # remembered at once; who is silent longest is forgotten, and counts as new


@dataclass(slots=True)
class Program:
    """One run of an agent, or one session. Instants and gaps in seconds."""

    order: int  # the arrival index of its first turn: programs stand in this order for good
    live: int = 0  # turns that wait or run
    waiting: int = 0
    is_pinned: bool = False
    tool: str | None = None  # what it went away to call
    departed_s: float | None = None  # since its last turn ended; None while a turn is here
    gap_s: float | None = None  # how long it was away before the turn that came last; None: it was not


class Programs(Observer):
    """The table of programs, by tenant and name. O(1) an event; bounded by PROGRAMS_MAX and what is live.

    `version` moves when a pin changes the rank of turns that are here.
    """

    def __init__(self, context: Context) -> None:
        self._programs: OrderedDict[ProgramKey, Program] = OrderedDict()
        self.version = 0

    def of(self, sequence: SequenceView) -> Program | None:
        """None: the request stands alone."""
        key = sequence.request.program
        return None if key is None else self._programs.get(key)

    def order(self, sequence: SequenceView) -> int:
        """By the first arrival of its program; a request that stands alone is its own program."""
        program = self.of(sequence)
        return sequence.arrival_index if program is None else program.order

    def __len__(self) -> int:
        return len(self._programs)

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        key = sequence.request.program
        if key is None:
            return
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = Program(sequence.arrival_index)
            self._forget_silent()
        self._programs.move_to_end(key)
        program.gap_s = None if program.departed_s is None else now_s - program.departed_s
        program.departed_s = None
        program.live += 1
        program.waiting += 1

    def started(self, sequence: SequenceView, now_s: float) -> None:
        program = self.of(sequence)
        if program is not None:
            program.waiting -= 1

    def left(self, sequence: SequenceView, now_s: float) -> None:
        program = self.of(sequence)
        if program is not None:
            program.waiting += 1

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        program = self.of(sequence)
        if program is None:
            return
        program.live -= 1
        program.waiting -= 1
        if program.live:
            return
        request = sequence.request
        is_answered = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if request.is_last_turn and is_answered and request.program is not None and not program.is_pinned:
            del self._programs[request.program]
            return
        program.tool = request.tool
        program.departed_s = now_s if is_answered else None

    def pinned(self, key: ProgramKey, until_s: float, now_s: float) -> None:
        self._mark(key, True)

    def unpinned(self, key: ProgramKey, why: PinEvent, now_s: float) -> None:
        self._mark(key, False)

    def _mark(self, key: ProgramKey, is_pinned: bool) -> None:
        program = self._programs.get(key)
        if program is None or program.is_pinned == is_pinned:
            return
        program.is_pinned = is_pinned
        if program.live:
            self.version += 1

    def _forget_silent(self) -> None:
        """Drop the longest silent program; one that is here or pinned goes to the end of the line instead."""
        if len(self._programs) <= PROGRAMS_MAX:
            return
        for _ in range(len(self._programs)):
            key, program = next(iter(self._programs.items()))
            if not program.live and not program.is_pinned:
                del self._programs[key]
                return
            self._programs.move_to_end(key)
