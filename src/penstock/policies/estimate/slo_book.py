"""What each request was promised, and when it is due."""

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
    """What these targets ask for the request: of a program's call with an end to meet, that; else a first
    token or a pace comes before an end. Pure."""
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

    def due_s(self, sequence: SequenceView) -> float | None:
        """When it is due to give something: its first token, or once it gave that, the end of its longest
        output, by its deadline or at its pace. Changes with the first token only; None: nothing is due.
        """
        request, slo, first_s = sequence.request, self.of(sequence.request), sequence.first_token_s
        if first_s is None:
            target_ms = slo.e2e_ms if slo.ttft_ms is None else slo.ttft_ms
            return None if target_ms is None else request.arrival_s + target_ms * 1e-3
        due_s = []
        if slo.e2e_ms is not None:
            due_s.append(request.arrival_s + slo.e2e_ms * 1e-3)
        if slo.tpot_ms is not None:
            due_s.append(first_s + (request.max_output_tokens - 1) * slo.tpot_ms * 1e-3)
        return min(due_s, default=None)
