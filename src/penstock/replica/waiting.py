"""The queue of a replica, kept in rank order."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from penstock.policies.rank import Rank, RankKey
from penstock.replica.sequence import Sequence

_Entry = tuple[RankKey, int, Sequence]  # the arrival index breaks ties before sequences are compared


class WaitingQueue:
    """Sorted by the rank policy's key; re-sorted only when the policy's version moves."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._version: int | None = None
        self._entries: list[_Entry] = []
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (entry[2] for entry in self._entries)

    def at(self, place: int) -> Sequence:
        """Counted from the head."""
        return self._entries[place][2]

    @property
    def total_tokens(self) -> int:
        """Known tokens of everything that waits."""
        return self._tokens

    def add(self, sequence: Sequence, now_s: float) -> None:
        bisect.insort(self._entries, self._entry(sequence, now_s))
        self._tokens += sequence.total_len

    def remove(self, sequence: Sequence) -> None:
        """The sequence is in the queue."""
        index = next(i for i, entry in enumerate(self._entries) if entry[2] is sequence)
        del self._entries[index]
        self._tokens -= sequence.total_len

    def refresh(self, now_s: float) -> None:
        """Bring the order up to date with the policy."""
        version = self._rank.version(now_s)
        if version != self._version:
            self._version = version
            self._entries = sorted(self._entry(entry[2], now_s) for entry in self._entries)

    def _entry(self, sequence: Sequence, now_s: float) -> _Entry:
        return (self._rank.key(sequence, now_s), sequence.arrival_index, sequence)
