"""Programs in the order of their first turns, those whose KV is pinned in front."""

from __future__ import annotations

from penstock.policies.base import NoOptions
from penstock.policies.context import Context
from penstock.policies.estimate.programs import Programs
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import SequenceView


@RANK.register("program-fcfs", source="Continuum (arXiv 2511.02230), request queue of its public preview")
class ProgramFcfs(Rank):
    """First come, first served by program: a later turn keeps the place that its first turn had.

    A turn whose program's KV is pinned goes first, for the memory is held until it runs; among those the
    oldest program. A request without `program_id` and `session_id` is a program of its own. Reads the
    request's hints and `arrival_index`. O(1) a sequence; keys change when a pin comes or goes.
    """

    def __init__(self, context: Context, options: NoOptions) -> None:
        self._programs = context.shared(Programs)

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        program = self._programs.of(sequence)
        if program is None:
            return (1, sequence.arrival_index)
        return (0 if program.is_pinned else 1, program.order)

    def version(self, now_s: float) -> int:
        return self._programs.version
