"""KV copies in host memory: whose they are, how far they are good, and where they lie. Accounting only.

A copy belongs to one conversation: a session, or a lone request. It stays when its sequence runs again, good
for the tokens [0, v), because KV of a position never changes; so the next swap-out adds what is new. Where
room is short, copies of lower-ranked conversations lose their ends: v falls to the first block that is lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from penstock.core.units import ceil_div
from penstock.replica.extents import Extents
from penstock.replica.sequence import Sequence

Owner = tuple[str, str] | int
RankOf = Callable[[Sequence], Any]


class HostCopy:
    """One conversation's KV on the host. `flights`: copies under way that read or write it."""

    __slots__ = ("blocks", "flights", "is_over", "keys", "owner", "sequence", "valid_len")

    def __init__(self, owner: Owner, sequence: Sequence) -> None:
        self.owner = owner
        self.sequence: Sequence | None = sequence  # the live one; None between turns
        self.blocks: list[int] = []  # in order of position
        self.valid_len = 0  # tokens that were really copied
        self.keys: list[bytes] = []  # between turns: what the blocks hold
        self.flights = 0
        self.is_over = False  # its sequence has ended, and only flights keep it from being put away


class HostTier:
    """All copies of one replica, within `block_count` host blocks."""

    def __init__(self, block_count: int, block_tokens: int, group_blocks: int) -> None:
        self.block_count = block_count
        self._block_tokens = block_tokens
        self._extents = Extents(block_count, group_blocks)
        self._by_seq: dict[int, HostCopy] = {}
        self._by_session: dict[Owner, HostCopy] = {}
        self._between_turns: OrderedDict[Owner, HostCopy] = OrderedDict()  # longest unused first

    @property
    def used_count(self) -> int:
        return self.block_count - self._extents.count

    def copy_of(self, sequence: Sequence) -> HostCopy | None:
        return self._by_seq.get(sequence.seq_id)

    def found_len(self, sequence: Sequence) -> int:
        """Leading tokens of `sequence` whose KV is here, its conversation's earlier turns included."""
        copy = self._by_seq.get(sequence.seq_id)
        if copy is not None:
            return copy.valid_len
        copy = self._between_turns.get(_session_of(sequence) or -1)
        return 0 if copy is None else self._matching_len(copy, sequence)

    def adopt(self, sequence: Sequence) -> HostCopy | None:
        """The sequence starts: what its conversation left is its own now, as far as the content is equal."""
        copy = self._by_seq.get(sequence.seq_id)
        if copy is not None:
            return copy
        copy = self._between_turns.pop(_session_of(sequence) or -1, None)
        if copy is None:
            return None
        self._cut(copy, self._matching_len(copy, sequence))
        if not copy.blocks:
            self._remove(copy)
            return None
        copy.sequence, copy.keys = sequence, []
        self._by_seq[sequence.seq_id] = copy
        return copy

    def reserve(self, sequence: Sequence, length: int, rank_of: RankOf) -> tuple[HostCopy, int]:
        """Room for the first `length` tokens of `sequence`, or for as many as there can be, and how many.

        Others lose their ends: conversations between turns first, then sequences that rank behind this one.
        """
        copy = self._by_seq.get(sequence.seq_id) or self._make(sequence)
        missing = ceil_div(length, self._block_tokens) - len(copy.blocks)
        if missing > self._extents.count:
            self._reclaim(missing, sequence, rank_of)
        fresh = max(0, min(missing, self._extents.count))
        copy.blocks += self._extents.take(fresh, copy.owner)
        return copy, min(length, len(copy.blocks) * self._block_tokens)

    def room_for(self, sequence: Sequence, length: int, rank_of: RankOf) -> int:
        """How many of the first `length` tokens `reserve` would find room for. Changes nothing."""
        copy = self._by_seq.get(sequence.seq_id)
        held = 0 if copy is None else len(copy.blocks)
        missing = ceil_div(length, self._block_tokens) - held
        room = self._extents.count
        if missing > room:
            room += sum(len(other.blocks) for other in self._losers(sequence, rank_of))
        return min(length, (held + max(0, min(missing, room))) * self._block_tokens)

    def spoil(self, copy: HostCopy, length: int) -> None:
        """Nothing from `length` on is good any more: the copying failed."""
        self._cut(copy, min(copy.valid_len, length))
        if not copy.blocks and not copy.flights and not copy.is_over:
            self._remove(copy)

    def discard(self, sequence: Sequence) -> None:
        """The copy is of no use; it goes when nothing touches it any more."""
        copy = self._by_seq.pop(sequence.seq_id, None)
        if copy is not None:
            copy.sequence, copy.is_over = None, True
            if self._by_session.get(copy.owner) is copy:
                del self._by_session[copy.owner]
            self.settle(copy)

    def end_turn(self, sequence: Sequence) -> None:
        """The sequence has ended, and its session may go on: the full blocks of known content stay."""
        copy = self._by_seq.get(sequence.seq_id)
        if copy is None:
            return
        if _session_of(sequence) != copy.owner:
            self.discard(sequence)
            return
        copy.is_over = True
        self.settle(copy)

    def settle(self, copy: HostCopy) -> None:
        """Put away the copy of a sequence that has ended, once nothing touches it."""
        if copy.flights or not copy.is_over:
            return
        sequence, copy.sequence, copy.is_over = copy.sequence, None, False
        if sequence is not None:
            del self._by_seq[sequence.seq_id]
            copy.keys = list(sequence.key_blocks(copy.valid_len // self._block_tokens, self._block_tokens))
            self._cut(copy, len(copy.keys) * self._block_tokens)
        if sequence is None or not copy.blocks:
            self._remove(copy)
        else:
            self._between_turns[copy.owner] = copy

    def check_invariants(self) -> None:
        """Raises AssertionError. O(blocks)."""
        self._extents.check_invariants()
        copies = {id(copy): copy for copy in [*self._by_seq.values(), *self._between_turns.values()]}
        blocks = [block for copy in copies.values() for block in copy.blocks]
        assert len(set(blocks)) == len(blocks), "a host block has one owner"
        assert not self._extents.free_blocks() & set(blocks)
        for copy in copies.values():
            assert copy.valid_len <= len(copy.blocks) * self._block_tokens
            assert (copy.sequence is None) == (copy.owner in self._between_turns)
        for owner, copy in self._between_turns.items():
            assert self._by_session.get(owner) is copy and not copy.flights
            assert (
                len(copy.keys) == len(copy.blocks) and copy.valid_len == len(copy.keys) * self._block_tokens
            )
        assert len(self._between_turns) <= self.block_count

    def _make(self, sequence: Sequence) -> HostCopy:
        """A session's copy has one live sequence; a second one at the same time has its own."""
        session = _session_of(sequence)
        stale = self._between_turns.pop(session, None) if session is not None else None
        if stale is not None:
            self._remove(stale)
        owner: Owner = sequence.seq_id if session is None or session in self._by_session else session
        copy = self._by_seq[sequence.seq_id] = HostCopy(owner, sequence)
        if owner == session:
            self._by_session[owner] = copy
        return copy

    def _matching_len(self, copy: HostCopy, sequence: Sequence) -> int:
        """Tokens in the leading blocks of equal content."""
        count = min(len(copy.keys), sequence.total_len // self._block_tokens)
        wanted = sequence.key_blocks(count, self._block_tokens) if sequence.is_keyed else ()
        same = 0
        for held, key in zip(copy.keys, wanted, strict=False):
            if held != key:
                break
            same += 1
        return same * self._block_tokens

    def _losers(self, sequence: Sequence, rank_of: RankOf) -> list[HostCopy]:
        """Whose ends may go for `sequence`, first those that go first."""
        mine = rank_of(sequence)
        behind = [
            (rank, copy)
            for copy in self._by_seq.values()
            if copy.sequence is not None and not copy.flights and (rank := rank_of(copy.sequence)) > mine
        ]
        behind.sort(key=lambda each: each[0], reverse=True)
        return [*self._between_turns.values(), *(copy for _, copy in behind)]

    def _reclaim(self, wanted: int, sequence: Sequence, rank_of: RankOf) -> None:
        for copy in self._losers(sequence, rank_of):
            missing = wanted - self._extents.count
            if missing <= 0:
                return
            kept = max(0, len(copy.blocks) - missing)
            self._cut(copy, min(copy.valid_len, kept * self._block_tokens), kept)
            if not copy.blocks:
                self._remove(copy)

    def _cut(self, copy: HostCopy, length: int, blocks_kept: int | None = None) -> None:
        """Keep the first `length` tokens. Where no block goes, the room to grow beside them stays."""
        assert length <= copy.valid_len
        kept = ceil_div(length, self._block_tokens) if blocks_kept is None else blocks_kept
        if kept < len(copy.blocks):
            self._extents.drop_tail(copy.owner)
            self._extents.give(copy.blocks[kept:])
            del copy.blocks[kept:]
            del copy.keys[kept:]
        copy.valid_len = length

    def _remove(self, copy: HostCopy) -> None:
        """Forget an empty copy, or drop a whole one."""
        self._extents.drop_tail(copy.owner)
        self._extents.give(copy.blocks)
        copy.blocks, copy.valid_len = [], 0
        if self._between_turns.get(copy.owner) is copy:
            del self._between_turns[copy.owner]
        if self._by_session.get(copy.owner) is copy:
            del self._by_session[copy.owner]
        if copy.sequence is not None and self._by_seq.get(copy.sequence.seq_id) is copy:
            del self._by_seq[copy.sequence.seq_id]


def _session_of(sequence: Sequence) -> Owner | None:
    """Sessions of different tenants are different conversations."""
    request = sequence.request
    return None if request.session_id is None else (request.tenant, request.session_id)
