"""Who holds which KV block. Accounting only; the executor holds the bytes.

A block is in exactly one of three states:

    held    ref_count >= 1: one or several sequences compute with it
    parked  ref_count == 0 and in the prefix index: still a possible hit, dropped when room is needed
    free    ref_count == 0 and without a key

`available` = free + parked. The prefix index maps the key of a full block (see `Sequence.key_blocks`) to
the block that holds its KV; a key names one block at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

from penstock.core.request import Request
from penstock.policies.retain import Retain


class KVPool:
    """Allocates, shares and drops blocks; asks the `retain` policy which parked block to drop."""

    def __init__(self, block_count: int, block_tokens: int, retain: Retain) -> None:
        assert block_count >= 1 and block_tokens >= 1
        self.block_count = block_count
        self.block_tokens = block_tokens
        self._retain = retain
        self._free = list(range(block_count - 1, -1, -1))
        self._ref_count = [0] * block_count
        self._key_of: list[bytes | None] = [None] * block_count
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
        return sum(self._ref_count[block] == 0 for block in blocks)

    def was_evicted(self, key: bytes) -> bool:
        return key in self._evicted

    def share(self, blocks: SequenceOf[int]) -> None:
        """One more holder for each of `blocks`, which are held or parked."""
        for block in blocks:
            if self._ref_count[block] == 0:
                assert self._key_of[block] is not None, "only keyed blocks can be shared"
                self._retain.revived(block)
            self._ref_count[block] += 1

    def allocate(self, count: int, now_s: float) -> list[int]:
        """`count` blocks with one holder each; the caller has checked `available`."""
        assert count <= self.available, f"asked for {count} blocks of {self.available}"
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._drop_parked(now_s)
            assert self._ref_count[block] == 0 and self._key_of[block] is None
            self._ref_count[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """The held `block` now has the KV of `key`. The first block to hold a key keeps it."""
        assert self._ref_count[block] >= 1 and self._key_of[block] is None
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key
            self._evicted.pop(key, None)

    def release(self, blocks: SequenceOf[int], request: Request, now_s: float) -> None:
        """One holder fewer for each; last blocks first, so that beginnings are parked longest."""
        for block in reversed(blocks):
            assert self._ref_count[block] >= 1, "a block is released once per holder"
            self._ref_count[block] -= 1
            if self._ref_count[block]:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._retain.parked(block, request, now_s)

    def _drop_parked(self, now_s: float) -> int:
        block = self._retain.victim(now_s)
        key = self._key_of[block]
        assert key is not None and self._ref_count[block] == 0
        del self._block_of[key]
        self._key_of[block] = None
        self._evicted[key] = None
        if len(self._evicted) > self.block_count:
            self._evicted.popitem(last=False)
        return block

    def check_invariants(self, holders: SequenceOf[SequenceOf[int]]) -> None:
        """`holders`: the blocks of every running sequence. Raises AssertionError. O(blocks)."""
        counts = [0] * self.block_count
        for blocks in holders:
            assert len(set(blocks)) == len(blocks), "a sequence holds a block once"
            for block in blocks:
                counts[block] += 1
        assert counts == self._ref_count, "reference counts equal the holders"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free once"
        assert all(counts[block] == 0 and self._key_of[block] is None for block in free)
        parked = sum(count == 0 and key is not None for count, key in zip(counts, self._key_of, strict=True))
        assert parked == len(self._retain), "the retain policy knows exactly the parked blocks"
        assert len(free) + parked + sum(count > 0 for count in counts) == self.block_count, "nothing is lost"
        assert {key: block for block, key in enumerate(self._key_of) if key is not None} == self._block_of
        assert len(self._evicted) <= self.block_count
