"""Free blocks as runs of consecutive ones, given out in groups.

A group is a run that belongs to one owner, who fills it from the left; what is not filled yet is the owner's
tail. So an owner's blocks lie side by side, and moving them takes few copies. Tails are lent, not given:
when nothing else is free they are cut in half, longest first. Freed runs merge with their neighbours.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable
from typing import Final

# What a new group holds beyond what is filled at once: at most one part in so many of what is free, so that
# groups are long while there is room and runs last when there is not; and these blocks at least.
SPARE_PARTS: Final = 64
SPARE_BLOCKS: Final = 3


class Extents:
    """Gives and takes blocks. O(log runs) to find a place; runs are few, since neighbours merge."""

    def __init__(self, block_count: int, group_blocks: int) -> None:
        assert block_count >= 0 and group_blocks >= 1
        self.block_count = block_count
        self.group_blocks = group_blocks
        self._starts: list[int] = []  # of the free runs, sorted by address
        self._length: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []  # (length, start), sorted
        self._tails: dict[Hashable, tuple[int, int]] = {}  # owner → (first, one past the last)
        self.count = 0  # blocks that nobody has filled: free ones and tails
        self._insert(0, block_count)
        self.count = block_count

    def take(self, count: int, owner: Hashable) -> list[int]:
        """`count` blocks in the order in which the owner is to fill them; `count` is at most `self.count`."""
        assert 0 <= count <= self.count, "the caller has looked"
        blocks = self._from_tail(count, owner)
        while len(blocks) < count:
            missing = count - len(blocks)
            if not self._starts:
                self._cut_longest_tail()
            spare = max(SPARE_BLOCKS, (self.count - count) // SPARE_PARTS)
            wanted = min(-(-missing // self.group_blocks) * self.group_blocks, missing + spare)
            start, length = self._take_run(wanted)
            used = min(missing, length)
            blocks += range(start, start + used)
            if used < length:
                self._tails[owner] = (start + used, start + length)
        self.count -= count
        return blocks

    def give(self, blocks: Iterable[int]) -> None:
        """These are free again."""
        freed = 0
        for start, length in runs_of(sorted(blocks)):
            self._insert(start, length)
            freed += length
        self.count += freed

    def drop_tail(self, owner: Hashable) -> None:
        """The owner will fill no more; its tail is free for all."""
        tail = self._tails.pop(owner, None)
        if tail is not None:
            self._insert(tail[0], tail[1] - tail[0])

    def check_invariants(self) -> None:
        """Raises AssertionError. O(runs)."""
        runs = [(start, start + self._length[start]) for start in self._starts]
        assert sorted(self._length) == self._starts
        assert sorted((stop - start, start) for start, stop in runs) == self._by_length
        assert all(left[1] < right[0] for left, right in zip(runs, runs[1:], strict=False)), (
            "neighbours merge"
        )
        parts = sorted([*runs, *self._tails.values()])
        assert all(0 <= start < stop <= self.block_count for start, stop in parts)
        assert all(left[1] <= right[0] for left, right in zip(parts, parts[1:], strict=False)), "no overlap"
        assert sum(stop - start for start, stop in parts) == self.count, "nothing is lost"

    def free_blocks(self) -> set[int]:
        """Every block that nobody has filled. O(blocks); for tests."""
        parts = [(start, start + self._length[start]) for start in self._starts] + list(self._tails.values())
        return {block for start, stop in parts for block in range(start, stop)}

    def _from_tail(self, count: int, owner: Hashable) -> list[int]:
        tail = self._tails.get(owner)
        if tail is None or not count:
            return []
        start, stop = tail
        used = min(count, stop - start)
        if start + used == stop:
            del self._tails[owner]
        else:
            self._tails[owner] = (start + used, stop)
        return list(range(start, start + used))

    def _take_run(self, wanted: int) -> tuple[int, int]:
        """The shortest run that is long enough, cut to size; else the longest. There is one."""
        index = bisect.bisect_left(self._by_length, (wanted, -1))
        length, start = self._by_length[min(index, len(self._by_length) - 1)]
        self._remove(start, length)
        if length > wanted:
            self._insert(start + wanted, length - wanted)
            length = wanted
        return start, length

    def _cut_longest_tail(self) -> None:
        """Its second half, so that its owner, too, can go on side by side. Ties by address."""
        owner = max(self._tails, key=self._tail_order)
        start, stop = self._tails.pop(owner)
        middle = start + (stop - start) // 2
        if middle > start:
            self._tails[owner] = (start, middle)
        self._insert(middle, stop - middle)

    def _tail_order(self, owner: Hashable) -> tuple[int, int]:
        start, stop = self._tails[owner]
        return stop - start, start

    def _insert(self, start: int, length: int) -> None:
        """A run becomes free, and one with its free neighbours."""
        if length == 0:
            return
        index = bisect.bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == start + length:
            right = self._starts[index]
            right_length = self._length[right]
            self._remove(right, right_length)
            length += right_length
        if index > 0:
            left = self._starts[index - 1]
            left_length = self._length[left]
            assert left + left_length <= start, "a block is freed once"
            if left + left_length == start:
                self._remove(left, left_length)
                start, length = left, left_length + length
        bisect.insort(self._starts, start)
        self._length[start] = length
        bisect.insort(self._by_length, (length, start))

    def _remove(self, start: int, length: int) -> None:
        del self._starts[bisect.bisect_left(self._starts, start)]
        del self._length[start]
        del self._by_length[bisect.bisect_left(self._by_length, (length, start))]


def runs_of(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """(first, length) of each stretch of consecutive ascending numbers, in order."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs
