"""Earliest deadline first."""

from __future__ import annotations

from typing import Final

from penstock.policies.base import NoOptions
from penstock.policies.context import Context
from penstock.policies.estimate.slo_book import SloBook
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import SequenceView

_NEVER: Final = float("inf")


@RANK.register("edf", source="Liu and Layland (JACM 1973)")
class EarliestDeadline(Rank):
    """Who must answer first goes first: its first token's instant, then its last token's.

    The deadline is the arrival plus the TTFT target, else plus the E2E target, of the request or its class;
    work without a target goes last. Once the first token is out, what counts is when the whole answer is due
    (E2E, or the pace of TPOT over the longest output). Meets every deadline where that is possible on one
    server; in overload everybody is late in turn. O(1) a sequence; a key changes once, with the first token.
    """

    def __init__(self, context: Context, options: NoOptions) -> None:
        self._book = context.shared(SloBook)
        self._version = 0

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        due_s = self._book.due_s(sequence)
        return (_NEVER if due_s is None else due_s,)

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        self._version += 1

    def version(self, now_s: float) -> int:
        return self._version

    def queue_version(self, now_s: float) -> int:
        return 0
