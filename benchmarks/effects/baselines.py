"""Simple policies to compare with, which nobody should serve on: registered while something is measured."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock.core.reasons import WaitReason
from penstock.core.request import Request
from penstock.policies.admit import Admission, Admit
from penstock.policies.preempt import Preempt
from penstock.policies.rank import Rank, RankKey
from penstock.policies.registry import Entry
from penstock.policies.retain import Retain
from penstock.policies.stack import REGISTRIES
from penstock.policies.view import Candidate, ReplicaView, SequenceView


@contextmanager
def baseline(slot: str, policy: type[Any]) -> Iterator[str]:
    """The name under which `policy` can stand in a stack until the context ends."""
    name = f"baseline-{policy.__name__.lower()}"
    entries = REGISTRIES[slot]._entries
    entries[name] = Entry(name, (policy.__doc__ or "").split("\n")[0], "a baseline", policy)
    try:
        yield name
    finally:
        del entries[name]


class ShortestPrompt(Rank):
    """The shortest prompt first; long ones wait for as long as short ones come."""

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (sequence.request.prompt_len,)


class FirstBlock(Admit):
    """Whoever can get one block starts, whether or not its prompt will fit."""

    def decide(self, candidate: Candidate, view: ReplicaView, now_s: float) -> Admission:
        cached_len = candidate.cached_len
        if candidate.blocks_revived + 1 > view.blocks_available:
            return Admission(reason=WaitReason.KV_CAPACITY)
        return Admission(reserve_len=cached_len + 1)


class Oldest(Preempt):
    """The first in rank yields: the one that has most to lose."""

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        return view.running[0]


class Cheapest(Preempt):
    """Of those behind the needy one, or itself, whoever has least KV to compute again."""

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        behind = list(itertools.dropwhile(lambda each: each is not needy, view.running))
        return min(behind, key=lambda each: (each.computed_len, -each.arrival_index))


class Fifo(Retain):
    """The block that was written first is dropped, however often it was read since."""

    def __init__(self, context: object, options: object) -> None:
        self._parked: set[int] = set()
        self._written: dict[int, int] = {}  # block → when its content was new
        self._line: list[tuple[int, int]] = []  # (written, block); entries of the revived surface and go
        self._clock = itertools.count()

    def parked(self, block: int, request: Request, now_s: float) -> None:
        self._parked.add(block)
        if block not in self._written:
            self._written[block] = next(self._clock)
        heapq.heappush(self._line, (self._written[block], block))

    def revived(self, block: int) -> None:
        self._parked.remove(block)

    def victim(self, now_s: float) -> int:
        while True:
            written, block = heapq.heappop(self._line)
            if block in self._parked and self._written[block] == written:
                self._parked.remove(block)
                del self._written[block]
                return block

    def __len__(self) -> int:
        return len(self._parked)


class Newest(Retain):
    """The last block of whoever left last is dropped."""

    def __init__(self, context: object, options: object) -> None:
        self._groups: dict[str, OrderedDict[int, None]] = {}  # request → its blocks, last ones first
        self._group_of: dict[int, str] = {}

    def parked(self, block: int, request: Request, now_s: float) -> None:
        self._groups.setdefault(request.id, OrderedDict())[block] = None
        self._group_of[block] = request.id

    def revived(self, block: int) -> None:
        name = self._group_of.pop(block)
        del self._groups[name][block]
        if not self._groups[name]:
            del self._groups[name]

    def victim(self, now_s: float) -> int:
        block = next(iter(next(reversed(self._groups.values()))))
        self.revived(block)
        return block

    def __len__(self) -> int:
        return len(self._group_of)
