"""Nano-operations on one device: who may run beside whom, at what price, and how long it all takes.

Kernels of one layer are bound by different things: matrix products by arithmetic, decode attention by
memory, collectives by the network. Cut into pieces over ranges of tokens (nano-operations), those of
different kinds can run side by side, each on a share of the device (NanoFlow, OSDI 2025, arXiv 2408.12757).
Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

COMPUTE, MEMORY, NETWORK = range(3)
KINDS: Final = ("compute", "memory", "network")
WHOLE: Final = 10
"""Shares are tenths of the device, so that sums are exact."""
_NOBODY: Final = -1
_NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class NanoOp:
    """One operation on one range of tokens. `after` are indices of operations that end before it begins."""

    name: str
    kind: int
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Interference:
    """What a kernel keeps of its speed on some tenths of the device: `memory[i]` on i of them, 0 to 10.

    A matrix product keeps its share. The others need few of the device's units to use up what they are bound
    by, so they keep more than their share: pairs of kernels were measured side by side, and three at once are
    taken to behave as pairs do.
    """

    memory: tuple[float, ...]
    network: tuple[float, ...]

    def __post_init__(self) -> None:
        for table in (self.memory, self.network):
            assert len(table) == WHOLE + 1 and table[0] == 0.0 and table[WHOLE] == 1.0
            assert all(low <= high for low, high in pairwise(table)), "more of the device is never slower"

    def kept(self, kind: int) -> Sequence[float]:
        """Speed by tenths, 0 to 1."""
        return (_PROPORTIONAL, self.memory, self.network)[kind]


_PROPORTIONAL: Final = tuple(tenths / WHOLE for tenths in range(WHOLE + 1))
PUBLISHED: Final = Interference(
    memory=(0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.78, 0.85, 0.95, 1.0),
    network=(0.0, 0.3, 0.5, 0.6, 0.7, 0.77, 0.83, 0.87, 0.9, 1.0, 1.0),
)
"""A100. The ends (0.1, 0.2, 0.8, 0.9) are the paper's table as we recall it, values between are ours."""


class NanoGraph:
    """Nano-operations in a topological order, and the times of schedules over them.

    A schedule is an order, a share for each operation, and this rule: operations of one kind run one after
    the other in that order (a stream each); one starts when what it depends on has ended and its share is
    free.
    """

    def __init__(self, ops: Sequence[NanoOp]) -> None:
        self.ops = tuple(ops)
        self._kinds = [op.kind for op in ops]
        self._after_counts = [len(op.after) for op in ops]
        self._nothing = [0] * len(ops)
        self._next: list[list[int]] = [[] for _ in ops]
        for index, op in enumerate(ops):
            assert all(before < index for before in op.after), "operations come in a topological order"
            for before in op.after:
                self._next[before].append(index)

    def ranked(self, seconds: Sequence[float]) -> list[int]:
        """Order by the longest way to the end, longest first: a topological order."""
        ways = [0.0] * len(self.ops)
        for index in reversed(range(len(self.ops))):
            ways[index] = seconds[index] + max((ways[later] for later in self._next[index]), default=0.0)
        return sorted(range(len(self.ops)), key=lambda index: (-ways[index], index))

    def timeline(
        self,
        seconds: Sequence[float],
        order: Sequence[int],
        tenths: Sequence[int] | None,
        interference: Interference,
    ) -> list[tuple[float, float]]:
        """(start, end) of each operation; `seconds` are alone on the device. None: as if nobody disturbed.

        O(operations). The order must be topological, or it stands still.
        """
        kinds, next_of = self._kinds, self._next
        if tenths is None:
            tenths, lasts = self._nothing, seconds
        else:
            kept = [interference.kept(kind) for kind in range(len(KINDS))]
            lasts = [
                alone_s / kept[kind][share]
                for alone_s, kind, share in zip(seconds, kinds, tenths, strict=True)
            ]
        streams: list[list[int]] = [[], [], []]
        place = [0] * len(kinds)
        for position, index in enumerate(order):
            streams[kinds[index]].append(index)
            place[index] = position
        heads = [iter(stream) for stream in streams]
        first = [next(head, _NOBODY) for head in heads]  # that waits in each stream
        ends = [_NEVER] * len(KINDS)  # of what runs in each
        running = [_NOBODY] * len(KINDS)
        open_after = list(self._after_counts)
        spans = [(0.0, 0.0)] * len(kinds)
        now, used, left = 0.0, 0, len(kinds)
        while left:
            ready = [index for index in first if index >= 0 and not open_after[index]]
            if len(ready) > 1:
                ready.sort(key=place.__getitem__)
            for index in ready:
                kind = kinds[index]
                if running[kind] == _NOBODY and used + tenths[index] <= WHOLE:
                    used += tenths[index]
                    running[kind], first[kind] = index, next(heads[kind], _NOBODY)
                    ends[kind] = now + lasts[index]
                    spans[index] = (now, ends[kind])
            now = min(ends)
            assert now < _NEVER, "the order is topological"
            for kind, end in enumerate(ends):
                if end <= now:
                    index = running[kind]
                    running[kind], ends[kind] = _NOBODY, _NEVER
                    used -= tenths[index]
                    left -= 1
                    for later in next_of[index]:
                        open_after[later] -= 1
        return spans
