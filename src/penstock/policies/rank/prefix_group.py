"""Groups of an offline job one after the other, behind everybody who waits for an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.estimate.groups import Groups
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import SequenceView

BATCH_CLASS: Final = "batch"


@dataclass(frozen=True, slots=True)
class PrefixGroupOptions:
    """`[policies.options.prefix-group]`."""

    batch_class: str = setting(BATCH_CLASS, "the class of service that goes behind all others")


@RANK.register("prefix-group", source="BatchLLM (MLSys 2026, arXiv 2412.03594): group execution")
class PrefixGroup(Rank):
    """Keep each group of a planned job together and in the plan's order; online traffic goes first.

    Order: requests of any other class by arrival; then the batch class by group, in the order in which
    the groups' first members came (the order of `desk/job_plan.py`), and by arrival within a group. A batch
    request without a group is a group of one. Nobody of the batch class is served while others fill the
    replica. The paper's order of groups, by expected output over prefill, is made once, by the plan, before
    anything is submitted.

    Reads `group_id`, `slo_class` and `arrival_index`. O(1) a sequence; keys never change.
    """

    Options = PrefixGroupOptions

    def __init__(self, context: Context, options: PrefixGroupOptions) -> None:
        self._batch_class = options.batch_class
        self._groups = context.shared(Groups)

    @classmethod
    def classes(cls, options: PrefixGroupOptions) -> frozenset[str]:
        return frozenset({options.batch_class})

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        if sequence.request.slo_class != self._batch_class:
            return (0, sequence.arrival_index)
        return (1, self._groups.order(sequence))
