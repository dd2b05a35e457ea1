"""KV that stays when a turn ends, for the next turn of its program: holders of blocks that do not run.

A pin holds blocks of the prefix index as a sequence would, so the pool cannot drop them and does not count
them as available. When a pin ends, its blocks are parked like anybody's. A program has one pin at most.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.core.reasons import PinEvent
from penstock.core.request import ProgramKey, Request
from penstock.policies.retain import Retain
from penstock.replica.kv_pool import KVPool

NEVER: Final = math.inf
ENDED_MAX: Final = 64  # expiries of pins that are gone that may stay in the heap, beside one a pin
_Hooks = Sequence[Callable[..., Any]]


@dataclass(slots=True, eq=False)
class Pin:
    """What one finished turn left."""

    program: ProgramKey
    until_s: float
    arrival_index: int
    blocks: list[int]
    request: Request
    is_held: bool = True

    @property
    def block_count(self) -> int:
        return len(self.blocks)


class Pins:
    """All pins of one replica. Bounded: each holds a block at least.

    A pin whose time is up while a turn of its program waits is overdue: it ends when that turn has started.
    """

    def __init__(self, pool: KVPool, retain: Retain, on_pinned: _Hooks, on_unpinned: _Hooks) -> None:
        self._pool = pool
        self._retain = retain
        self._on_pinned = on_pinned
        self._on_unpinned = on_unpinned
        self._by_program: dict[ProgramKey, Pin] = {}
        self._expiries: list[tuple[float, int, Pin]] = []  # a heap; with pins that ended otherwise
        self._overdue: dict[ProgramKey, Pin] = {}
        self._blocks: Counter[int] = Counter()  # how many pins hold each
        self.counts = {event.value: 0 for event in PinEvent}

    def __len__(self) -> int:
        return len(self._by_program)

    @property
    def block_count(self) -> int:
        """Blocks that pins hold."""
        return len(self._blocks)

    @property
    def due_s(self) -> float:
        """When the next pin's time is up."""
        while self._expiries and not self._expiries[0][2].is_held:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else NEVER

    @property
    def has_overdue(self) -> bool:
        return bool(self._overdue)

    def holds(self) -> list[list[int]]:
        """The blocks of each pin."""
        return [pin.blocks for pin in self._by_program.values()]

    def make(
        self, program: ProgramKey, blocks: list[int], turn: tuple[int, Request], until_s: float, now_s: float
    ) -> None:
        """Hold `blocks`, which are in the prefix index. `turn`: arrival index and request that ended."""
        assert program not in self._by_program and blocks and until_s >= now_s
        arrival_index, request = turn
        pin = Pin(program, until_s, arrival_index, blocks, request)
        self._pool.share(blocks)
        self._blocks.update(blocks)
        self._by_program[program] = pin
        if until_s < NEVER:
            heapq.heappush(self._expiries, (until_s, arrival_index, pin))
        self.counts[PinEvent.MADE] += 1
        for hook in self._on_pinned:
            hook(program, until_s, now_s)

    def hit(self, program: ProgramKey) -> None:
        """A turn of `program` starts for the first time."""
        self.counts[PinEvent.HIT] += program in self._by_program

    def end(self, program: ProgramKey, why: PinEvent, now_s: float) -> bool:
        """Whether there was a pin of `program` to end."""
        pin = self._by_program.get(program)
        if pin is not None:
            self._end(pin, why, now_s)
        return pin is not None

    def sacrifice(self, now_s: float, spared: ProgramKey | None = None) -> bool:
        """End the pin that the `retain` policy names, `spared` only as the last; False without pins."""
        candidates = [pin for pin in self._by_program.values() if pin.program != spared]
        if not candidates:
            return spared is not None and self.end(spared, PinEvent.SACRIFICED, now_s)
        victim = self._retain.sacrifice(candidates, now_s)
        assert isinstance(victim, Pin) and victim.is_held
        self._end(victim, PinEvent.SACRIFICED, now_s)
        return True

    def expire(self, now_s: float, awaited: Callable[[ProgramKey], bool]) -> bool:
        """End what is up by now, unless a turn of its program waits. Whether any ended.

        Ends in order of expiry and, as far as the policy can see, at the instant of expiry, so that it does
        not matter how often anybody looks.
        """
        ended = False
        for pin in [pin for pin in self._overdue.values() if not awaited(pin.program)]:
            self._end(pin, PinEvent.EXPIRED, now_s)
            ended = True
        while self.due_s < now_s:  # who returns at the last instant is in time
            until_s, _, pin = heapq.heappop(self._expiries)
            if awaited(pin.program):
                self._overdue[pin.program] = pin
            else:
                self._end(pin, PinEvent.EXPIRED, until_s)
                ended = True
        return ended

    def check_invariants(self, now_s: float) -> None:
        """Raises AssertionError. O(blocks)."""
        held = Counter(block for pin in self._by_program.values() for block in pin.blocks)
        assert held == self._blocks, "each pinned block is counted once a pin"
        assert len(self._blocks) <= self._pool.block_count
        assert all(pin.is_held and key == pin.program for key, pin in self._by_program.items())
        assert self._overdue.items() <= self._by_program.items()
        assert all(pin.until_s < now_s for pin in self._overdue.values())
        assert len(self._expiries) <= 2 * len(self._by_program) + ENDED_MAX, "what has ended is forgotten"

    def _end(self, pin: Pin, why: PinEvent, now_s: float) -> None:
        pin.is_held = False
        del self._by_program[pin.program]
        self._overdue.pop(pin.program, None)
        for block in pin.blocks:
            if self._blocks[block] == 1:
                del self._blocks[block]
            else:
                self._blocks[block] -= 1
        self._pool.release(pin.blocks, len(pin.blocks), pin.request, now_s)
        if len(self._expiries) > 2 * len(self._by_program) + ENDED_MAX:
            # A next turn mostly comes before the time is up; until then its entry would keep the prompt
            self._expiries = [entry for entry in self._expiries if entry[2].is_held]
            heapq.heapify(self._expiries)
        self.counts[why] += 1
        for hook in self._on_unpinned:
            hook(pin.program, why, now_s)
