"""What each request was promised, and how much time is left for it."""

from __future__ import annotations

from enum import Enum
from typing import Final

from penstock.core.metrics import Slo
from penstock.core.request import Request
from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.view import SequenceView

_NOTHING: Final = Slo()


class Promise(Enum):
    """What kind of service the targets ask for (JITServe, NSDI 2026)."""

    LATENCY = "latency"  # a first token, or a pace
    THROUGHPUT = "throughput"  # the whole answer by a deadline
    COLLECTIVE = "collective"  # the same, for the calls of one program together
    NONE = "none"  # no target


def promise_of(slo: Slo, request: Request) -> Promise:
    """What these targets ask for the request. Pure."""
    if request.program_id is not None and slo.e2e_ms is not None:
        return Promise.COLLECTIVE
    if slo.ttft_ms is not None or slo.tpot_ms is not None:
        return Promise.LATENCY
    return Promise.NONE if slo.e2e_ms is None else Promise.THROUGHPUT


class SloBook(Observer):
    """Targets and deadlines. Reads the request's own targets, else those of its class; keeps no state.

    Instants are seconds on the clock of `arrival_s`.
    """

    def __init__(self, context: Context) -> None:
        self._slos = context.terms.slos

    def of(self, request: Request) -> Slo:
        """Its targets; an empty `Slo` where nothing was promised."""
        return request.slo or self._slos.get(request.slo_class, _NOTHING)

    def promise(self, request: Request) -> Promise:
        """A program's calls count together where they have an end to meet; a first token or pace comes first
        for anybody else."""
        return promise_of(self.of(request), request)

    def deadline_s(self, request: Request) -> float | None:
        """The first instant it was promised: of its first token, else of its end. Never changes."""
        slo = self.of(request)
        target_ms = slo.e2e_ms if slo.ttft_ms is None else slo.ttft_ms
        return None if target_ms is None else request.arrival_s + target_ms * 1e-3

    def end_due_s(self, request: Request, output_tokens: int, first_token_s: float | None) -> float | None:
        """When the last of `output_tokens` tokens is due: by its end, or at its pace after the first token.

        Before the first token the pace counts from when that is due. None: neither was promised.
        """
        slo, due_s = self.of(request), []
        if slo.e2e_ms is not None:
            due_s.append(request.arrival_s + slo.e2e_ms * 1e-3)
        if slo.tpot_ms is not None:
            begun_s = first_token_s
            if begun_s is None:
                begun_s = request.arrival_s + (slo.ttft_ms or 0.0) * 1e-3
            due_s.append(begun_s + (output_tokens - 1) * slo.tpot_ms * 1e-3)
        return min(due_s, default=None)

    def slack_s(self, sequence: SequenceView, now_s: float, need_s: float) -> float:
        """Seconds it could do nothing and still be in time, if what it is due next takes `need_s` from now.

        Due next is the first token while there is none, then the end at its longest output. Below 0 it will
        be late; infinite where nothing is due.
        """
        request = sequence.request
        if sequence.first_token_s is None:
            due_s = self.deadline_s(request)
        else:
            due_s = self.end_due_s(request, request.max_output_tokens, sequence.first_token_s)
        return float("inf") if due_s is None else due_s - now_s - need_s
