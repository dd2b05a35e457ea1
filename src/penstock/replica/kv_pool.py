"""Who holds which KV block. Accounting only; the executor holds the bytes.

    private   one sequence holds it, and nobody else can find it: its place in that list is its only state
    shared    in the prefix index and held by `holders` >= 1 sequences
    parked    in the prefix index and held by nobody: a possible hit, dropped when room is needed
    free

`available` = free + parked. The prefix index maps the key of a full block (see `Sequence.key_blocks`) to the
block that holds its KV; a key names one block at most. A sequence's list begins with the blocks that may be
shared (`shared_count` of them) and ends with private ones, which are given and taken in bulk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from typing import ClassVar

from penstock.core.request import Request
from penstock.policies.retain import Retain


class KVPool:
    """Allocates, shares and drops blocks; asks the `retain` policy which parked block to drop."""

    in_groups: ClassVar[bool] = False  # whether it matters who a block is for

    def __init__(self, block_count: int, block_tokens: int, retain: Retain) -> None:
        assert block_count >= 1 and block_tokens >= 1
        self.block_count = block_count
        self.block_tokens = block_tokens
        self._retain = retain
        self._free = list(range(block_count - 1, -1, -1))
        self._holders: dict[int, int] = {}  # of indexed blocks, shared or parked
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Keys dropped lately, to tell a miss by eviction from a miss of something new; bounded.
        self._evicted: OrderedDict[bytes, None] = OrderedDict()

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def parked_count(self) -> int:
        return len(self._retain)

    @property
    def available(self) -> int:
        return len(self._free) + len(self._retain)

    @property
    def held_count(self) -> int:
        return self.block_count - self.available

    def match(self, keys: SequenceOf[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `keys`. Changes nothing."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def parked_among(self, blocks: SequenceOf[int]) -> int:
        """How many of `blocks` are parked. Changes nothing."""
        return sum(self._holders[block] == 0 for block in blocks)

    def sole(self, blocks: SequenceOf[int]) -> int:
        """How many of `blocks` have one holder. Changes nothing."""
        return sum(self._holders.get(block, 1) == 1 for block in blocks)

    def was_evicted(self, key: bytes) -> bool:
        return key in self._evicted

    def share(self, blocks: SequenceOf[int]) -> None:
        """One more holder for each of `blocks`, which are shared or parked."""
        for block in blocks:
            holders = self._holders[block]
            if holders == 0:
                self._retain.revived(block)
            self._holders[block] = holders + 1

    def allocate(self, count: int, now_s: float, owner: int = 0) -> list[int]:
        """`count` private blocks for sequence `owner`; the caller has checked `available`."""
        free = self._free
        while len(free) < count:
            free.append(self._drop_parked(now_s))
        if count == 0:
            return []
        blocks = free[-count:]
        del free[-count:]
        return blocks

    def publish(self, block: int, key: bytes) -> bool:
        """A private block becomes shared under `key`; False, and nothing changes, where the key is taken."""
        if key in self._block_of:
            return False
        assert block not in self._holders, "a block is published once"
        self._block_of[key] = block
        self._key_of[block] = key
        self._holders[block] = 1
        self._evicted.pop(key, None)
        return True

    def release(
        self, blocks: SequenceOf[int], shared_count: int, request: Request, now_s: float, first: int = 0
    ) -> None:
        """The holder leaves. Last blocks first, so that beginnings are parked longest.

        `first`: how many blocks of the holder lie before these.
        """
        self._free += blocks[shared_count:]
        for index in range(shared_count - 1, -1, -1):
            block = blocks[index]
            holders = self._holders.get(block)
            if holders is None:  # it stayed private: another block had its key first
                self._free.append(block)
                continue
            assert holders >= 1, "a block is released once per holder"
            self._holders[block] = holders - 1
            if holders == 1:
                self._retain.parked_at(block, (first + index + 1) * self.block_tokens, request, now_s)

    def drop_tail(self, owner: int) -> None:
        """The sequence `owner` takes no more blocks."""

    def _drop_parked(self, now_s: float) -> int:
        block = self._retain.victim(now_s)
        key = self._key_of.pop(block)
        assert self._holders.pop(block) == 0
        del self._block_of[key]
        self._evicted[key] = None
        if len(self._evicted) > self.block_count:
            self._evicted.popitem(last=False)
        return block

    def _free_blocks(self) -> set[int]:
        return set(self._free)

    def check_invariants(self, holders: SequenceOf[SequenceOf[int]]) -> None:
        """`holders`: the blocks of every running sequence. Raises AssertionError. O(blocks)."""
        counts: dict[int, int] = {}
        for blocks in holders:
            assert len(set(blocks)) == len(blocks), "a sequence holds a block once"
            for block in blocks:
                counts[block] = counts.get(block, 0) + 1
        assert all(counts.get(block, 0) == held for block, held in self._holders.items())
        private = {block for block in counts if block not in self._holders}
        assert all(counts[block] == 1 for block in private), "a private block has one holder"
        free = self._free_blocks()
        assert len(free) == self.free_count, "a block is free once"
        assert not free & counts.keys() and not free & self._holders.keys()
        parked = sum(held == 0 for held in self._holders.values())
        assert parked == len(self._retain), "the retain policy knows exactly the parked blocks"
        assert len(free) + len(private) + len(self._holders) == self.block_count, "nothing is lost"
        assert self._holders.keys() == self._key_of.keys()
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        assert len(self._evicted) <= self.block_count
