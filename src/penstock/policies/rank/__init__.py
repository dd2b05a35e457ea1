"""Slot `rank`: the order of waiting and running work. Smaller keys go first."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from penstock.policies.base import Policy
from penstock.policies.registry import Registry
from penstock.policies.view import SequenceView

RankKey = tuple[Any, ...]


class Rank(Policy):
    """A key stays valid while `version` returns the same number; the replica re-sorts when it changes.

    Equal keys go by arrival. `reorders`: whether anything but arrival counts; then the whole queue stands in
    the replica, where this policy sorts it, instead of in the desk. `reads_priority`: whether the request's
    `priority` counts.
    """

    reorders: ClassVar[bool] = True
    reads_priority: ClassVar[bool] = False

    @abstractmethod
    def key(self, sequence: SequenceView, now_s: float) -> RankKey: ...

    def version(self, now_s: float) -> int:
        """Constant where keys never change."""
        return 0


RANK: Registry[Rank] = Registry("rank")
