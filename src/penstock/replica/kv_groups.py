"""Blocks in groups: a sequence's blocks lie side by side, so that a swap takes few copies (card fastswitch).

Blocks of the prefix index stay where they are when their sequence leaves, and split the run that they lie in
until they are dropped: sharing and large runs are at odds.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import ClassVar

from penstock.policies.retain import Retain
from penstock.replica.extents import Extents
from penstock.replica.kv_pool import KVPool
from penstock.replica.limits import ReplicaLimits


class GroupedPool(KVPool):
    """A pool whose free blocks are runs. What was just freed gathers in `_free` until it is needed."""

    in_groups: ClassVar[bool] = True

    def __init__(self, block_count: int, block_tokens: int, retain: Retain, group_blocks: int) -> None:
        super().__init__(block_count, block_tokens, retain)
        self._free.clear()
        self._extents = Extents(block_count, group_blocks)

    @property
    def free_count(self) -> int:
        """Unfilled parts of groups count: they go to whoever needs them."""
        return len(self._free) + self._extents.count

    @property
    def available(self) -> int:
        return self.free_count + self.parked_count

    def allocate(self, count: int, now_s: float, owner: int = 0) -> list[int]:
        while self.free_count < count:
            self._free.append(self._drop_parked(now_s))
        if self._free:
            self._extents.give(self._free)
            self._free.clear()
        return self._extents.take(count, owner)

    def drop_tail(self, owner: int) -> None:
        self._extents.drop_tail(owner)

    def check_invariants(self, holders: SequenceOf[SequenceOf[int]]) -> None:
        self._extents.check_invariants()
        super().check_invariants(holders)

    def _free_blocks(self) -> set[int]:
        return self._extents.free_blocks().union(self._free)


def make_pool(limits: ReplicaLimits, retain: Retain) -> KVPool:
    """Single blocks, or groups where the limits say how large."""
    if not limits.kv_group_tokens:
        return KVPool(limits.kv_blocks, limits.kv_block_tokens, retain)
    return GroupedPool(limits.kv_blocks, limits.kv_block_tokens, retain, limits.kv_group_blocks)
