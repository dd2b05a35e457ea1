"""The queue of a replica, kept in rank order."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Final

from penstock.core.request import ProgramKey
from penstock.policies.rank import Rank, RankKey
from penstock.replica.sequence import Sequence

_Entry = tuple[RankKey, int, Sequence]  # the arrival index breaks ties before sequences are compared
_EVERYBODY: Final = ""


class WaitingQueue:
    """Sorted by the rank policy's key; re-sorted only when the policy's version moves.

    One line holds everybody; or, where the rank orders tenants, each tenant has a line, whose order does not
    change, and only the lines are sorted again.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._by_tenant = rank.orders_tenants
        self._version: int | None = None
        self._lines: dict[str, list[_Entry]] = {}  # none is empty
        self._order: list[str] = []  # names of the lines
        self._count = 0
        self._tokens = 0
        self._turns: Counter[ProgramKey] = Counter()  # how many of each program's wait

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        lines = (self._lines[name] for name in self._order)
        return (entry[2] for entry in chain.from_iterable(lines))

    def at(self, place: int) -> Sequence:
        """Counted from the head."""
        for name in self._order:
            line = self._lines[name]
            if place < len(line):
                return line[place][2]
            place -= len(line)
        raise IndexError(place)

    @property
    def total_tokens(self) -> int:
        """Known tokens of everything that waits."""
        return self._tokens

    def has_turn_of(self, program: ProgramKey) -> bool:
        """Whether a turn of `program` waits."""
        return program in self._turns

    def add(self, sequence: Sequence, now_s: float) -> None:
        name, entry = self._name(sequence), self._entry(sequence, now_s)
        line = self._lines.get(name)
        if line is None:
            self._lines[name] = [entry]
            bisect.insort(self._order, name, key=lambda each: self._lead(each, now_s))
        else:
            bisect.insort(line, entry)
        self._count += 1
        self._tokens += sequence.total_len
        if (program := sequence.request.program) is not None:
            self._turns[program] += 1

    def remove(self, sequence: Sequence) -> None:
        """The sequence is in the queue."""
        name = self._name(sequence)
        line = self._lines[name]
        index = next(i for i, entry in enumerate(line) if entry[2] is sequence)
        del line[index]
        if not line:
            del self._lines[name]
            self._order.remove(name)
        self._count -= 1
        self._tokens -= sequence.total_len
        if (program := sequence.request.program) is not None:
            self._turns[program] -= 1
            if not self._turns[program]:
                del self._turns[program]

    def refresh(self, now_s: float) -> None:
        """Bring the order up to date with the policy."""
        version = self._rank.queue_version(now_s)
        if version == self._version:
            return
        self._version = version
        if self._by_tenant:
            self._order.sort(key=lambda name: self._lead(name, now_s))
        elif self._lines:
            everybody = self._lines[_EVERYBODY]
            everybody[:] = sorted(self._entry(entry[2], now_s) for entry in everybody)

    def _name(self, sequence: Sequence) -> str:
        return sequence.request.tenant if self._by_tenant else _EVERYBODY

    def _lead(self, name: str, now_s: float) -> RankKey:
        """What the lines are sorted by: the tenant's part of the key."""
        return self._rank.key(self._lines[name][0][2], now_s)[:1]

    def _entry(self, sequence: Sequence, now_s: float) -> _Entry:
        key = self._rank.key(sequence, now_s)
        return (key[1:] if self._by_tenant else key, sequence.arrival_index, sequence)
