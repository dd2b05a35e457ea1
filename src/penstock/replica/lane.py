"""The decode lane: sequences that advance together, one token a step, at the cost of one addition.

A member's length is `clock + offset`. What happens to single members is found without looking at the others:

- who needs its next block at this clock: members are filed under the clock, modulo the block size, at which
  their last block is full;
- who reaches its maximum output: a heap of clock values.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from penstock.replica.sequence import Sequence

STALE_MAX: Final = 64  # stale entries that may stay in the heap, beside one a member


class DecodeLane:
    """All decoding sequences of one replica, in order of joining."""

    def __init__(self, block_tokens: int) -> None:
        self.clock = 0  # steps that the lane has advanced
        self.members: dict[int, Sequence] = {}
        self._offsets = 0  # the sum over members
        self._block_tokens = block_tokens
        self._edges: list[dict[int, Sequence]] = [{} for _ in range(block_tokens)]
        self._finishes: list[tuple[int, int, Sequence]] = []

    @property
    def context(self) -> int:
        """Tokens in the KV of all members."""
        return self._offsets + self.clock * len(self.members)

    def join(self, sequence: Sequence) -> None:
        """From now on `sequence` advances with the lane, for `output_left` more tokens at most."""
        computed_len, output_left = sequence.computed_len, sequence.output_left
        sequence.offset = computed_len - self.clock
        sequence.finish_clock = self.clock + output_left
        sequence.lane = self
        self.members[sequence.seq_id] = sequence
        self._offsets += sequence.offset
        self._edges[-sequence.offset % self._block_tokens][sequence.seq_id] = sequence
        heapq.heappush(self._finishes, (sequence.finish_clock, sequence.arrival_index, sequence))

    def leave(self, sequence: Sequence) -> None:
        """The sequence keeps its lengths, and no longer advances."""
        sequence.known_len = sequence.total_len
        sequence.computed = sequence.computed_len
        del self._edges[-sequence.offset % self._block_tokens][sequence.seq_id]
        del self.members[sequence.seq_id]
        self._offsets -= sequence.offset
        sequence.lane = None
        self._forget_stale()

    def pause(self, sequence: Sequence) -> None:
        """Leave `sequence` out of the next advance."""
        del self._edges[-sequence.offset % self._block_tokens][sequence.seq_id]
        sequence.offset -= 1
        self._offsets -= 1
        sequence.finish_clock += 1
        self._edges[-sequence.offset % self._block_tokens][sequence.seq_id] = sequence
        heapq.heappush(self._finishes, (sequence.finish_clock, sequence.arrival_index, sequence))
        self._forget_stale()

    def at_edge(self) -> dict[int, Sequence]:
        """Members whose KV ends with a full block. A window: it changes with the lane."""
        return self._edges[self.clock % self._block_tokens]

    def edges_within(self, steps: int, limit: int) -> int:
        """How many of the next `steps` steps may be made before `limit` blocks are used up, at least one.

        The first step's own blocks are not counted: it has them already.
        """
        if len(self.members) * (steps // self._block_tokens + 1) <= limit:
            return steps
        for step in range(1, steps):
            limit -= len(self._edges[(self.clock + step) % self._block_tokens])
            if limit < 0:
                return step
        return steps

    def steps_to_finish(self) -> int:
        """Steps until some member reaches its maximum output. There is a member."""
        while self._is_stale(self._finishes[0]):
            heapq.heappop(self._finishes)
        return self._finishes[0][0] - self.clock

    def finished(self) -> list[Sequence]:
        """Take out of the heap, and return, the members that have reached their maximum output."""
        found: dict[int, Sequence] = {}  # who left and came back may be in the heap twice with one clock
        while self._finishes and self._finishes[0][0] <= self.clock:
            entry = heapq.heappop(self._finishes)
            if not self._is_stale(entry):
                found[entry[2].seq_id] = entry[2]
        return list(found.values())

    def check_invariants(self) -> None:
        filed = [seq_id for edge in self._edges for seq_id in edge]
        assert sorted(filed) == sorted(self.members), "each member is filed once"
        for position, edge in enumerate(self._edges):
            for sequence in edge.values():
                assert (sequence.computed_len - self.clock + position) % self._block_tokens == 0
        assert self.context == sum(sequence.computed_len for sequence in self.members.values())
        live = {entry[2].seq_id for entry in self._finishes if not self._is_stale(entry)}
        assert live == set(self.members), "each member has its end in the heap"
        assert len(self._finishes) <= 2 * len(self.members) + STALE_MAX, "who left is forgotten"

    def _forget_stale(self) -> None:
        """Most end long before their maximum; until then their entries would keep them in memory."""
        if len(self._finishes) > 2 * len(self.members) + STALE_MAX:
            self._finishes = [entry for entry in self._finishes if not self._is_stale(entry)]
            heapq.heapify(self._finishes)

    def _is_stale(self, entry: tuple[int, int, Sequence]) -> bool:
        """Whether the member has left, or was paused since the entry was made."""
        return entry[2].lane is not self or entry[2].finish_clock != entry[0]
