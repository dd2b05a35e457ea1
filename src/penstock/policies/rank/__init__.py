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
    orders_tenants: ClassVar[bool] = False  # see `key`

    @classmethod
    def classes(cls, options: Any) -> frozenset[str]:
        """Classes of service that `options`, an `Options` of this class, name."""
        return frozenset()

    @abstractmethod
    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        """With `orders_tenants` the first element is the tenant's own, at any one version, and the rest of
        the key never changes: then a change of version costs a sort of the tenants, not of the queue.
        """

    def outranks(self, head: SequenceView, other: SequenceView, now_s: float) -> bool:
        """Whether `head`, which waits, may take the place of `other`, which runs; then its key is smaller.

        Equals never do. Where keys drift the policy asks for a margin as well, so that two cannot push each
        other out in turn. An answer of False may become True only with an event, after `steps_valid` steps,
        or when `version` moves.
        """
        return self.key(head, now_s) < self.key(other, now_s)

    def version(self, now_s: float) -> int:
        """Constant where keys never change."""
        return 0

    def queue_version(self, now_s: float) -> int:
        """The same for the keys of those that wait: override it where only those that run change theirs."""
        return self.version(now_s)


RANK: Registry[Rank] = Registry("rank")
