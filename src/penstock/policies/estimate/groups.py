"""Which groups of an offline job have members inside the replica, and since when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.reasons import FinishReason
from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.view import SequenceView

GroupKey = tuple[str, str]  # tenant, and the tenant's name for the group


def group_key(sequence: SequenceView) -> GroupKey | None:
    """None: it stands alone."""
    request = sequence.request
    return None if request.group_id is None else (request.tenant, request.group_id)


@dataclass(slots=True)
class _Group:
    order: int  # arrival index of the first member
    open: int = 0  # members that have not ended


class Groups(Observer):
    """Counts the members of each group that wait or run. Holds what is inside and no more. O(1) an event.

    A group lives from its first member's submission to its last member's end. When members come again
    later, under the same name, that is a new life.
    """

    def __init__(self, context: Context) -> None:
        self._groups: dict[GroupKey, _Group] = {}
        self.on_opened: list[Callable[[GroupKey], None]] = []
        self.on_closed: list[Callable[[GroupKey], None]] = []

    def order(self, sequence: SequenceView) -> int:
        """The place of its group among all: the arrival index of the first member, or its own."""
        key = group_key(sequence)
        return sequence.arrival_index if key is None else self._groups[key].order

    def is_open(self, key: GroupKey) -> bool:
        return key in self._groups

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        key = group_key(sequence)
        if key is None:
            return
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(sequence.arrival_index)
            for tell in self.on_opened:
                tell(key)
        group.open += 1

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        key = group_key(sequence)
        if key is None:
            return
        group = self._groups[key]
        group.open -= 1
        if not group.open:
            del self._groups[key]
            for tell in self.on_closed:
                tell(key)
