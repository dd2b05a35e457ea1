"""The youngest program yields; a last turn, which frees its memory for good, is spared."""

from __future__ import annotations

from penstock.policies.base import NoOptions
from penstock.policies.context import Context
from penstock.policies.estimate.programs import Programs
from penstock.policies.preempt import PREEMPT, Preempt
from penstock.policies.view import ReplicaView, SequenceView


@PREEMPT.register("program", source="Continuum (arXiv 2511.02230), scheduler of its public preview")
class YoungestProgram(Preempt):
    """The running turn of the youngest program yields and is recomputed, last turns only after all others.

    The order (last turn or not, first arrival of the program, arrival) is strict and does not change while
    they run, so the first in it always advances. Reads `is_last_turn` and the program's hints. O(running).
    """

    def __init__(self, context: Context, options: NoOptions) -> None:
        self._programs = context.shared(Programs)

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        return max(view.running, key=self._order)

    def _order(self, sequence: SequenceView) -> tuple[bool, int, int]:
        return (not sequence.request.is_last_turn, self._programs.order(sequence), sequence.arrival_index)
