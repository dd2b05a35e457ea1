"""When each request of a replay is due: recorded instants (open loop), or think time after answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from penstock.workloads.exchange import PlannedRequest
from penstock.workloads.sessions import SessionLoop, Turn
from penstock.workloads.trace import TraceRow

LOOKAHEAD_REQUESTS = 64  # bodies made before they are due, so that a burst does not wait for them

BodyMaker = Callable[[int, TraceRow], bytes]
Clock = Callable[[], float]


class Pacer(Protocol):
    """Hands out requests one by one, each when it is due."""

    async def next(self) -> PlannedRequest | None:
        """Wait until the next request is due; None when there is none left. Raises TraceError."""

    def finished(self, planned: PlannedRequest, finish_s: float) -> None:
        """A request handed out before has ended."""


class OpenLoop:
    """Arrivals as recorded. They never wait for answers."""

    def __init__(self, rows: Iterator[TraceRow], make_body: BodyMaker, clock: Clock) -> None:
        self._rows = enumerate(rows)
        self._make_body = make_body
        self._clock = clock
        self._ready: deque[PlannedRequest] = deque()

    async def next(self) -> PlannedRequest | None:
        if not self._ready and not self._prepare():
            return None
        while len(self._ready) < LOOKAHEAD_REQUESTS and self._ready[0].due_s > self._clock():
            if not self._prepare():
                break
            await asyncio.sleep(0)  # answers are read in between
        planned = self._ready.popleft()
        await asyncio.sleep(max(0.0, planned.due_s - self._clock()))
        return planned

    def finished(self, planned: PlannedRequest, finish_s: float) -> None:
        """Nothing follows from an answer in an open loop."""

    def _prepare(self) -> bool:
        index, row = next(self._rows, (0, None))
        if row is None:
            return False
        self._ready.append(PlannedRequest(index, row, row.arrival_s, self._make_body(index, row)))
        return True


class ClosedLoop:
    """Sessions wait for their answers and for their users; `sessions.SessionLoop` says who is due when."""

    def __init__(
        self, rows: Iterator[TraceRow], make_body: BodyMaker, clock: Clock, rate_scale: float
    ) -> None:
        """`rate_scale` as for `SessionLoop`. Reads all rows."""
        self._make_body = make_body
        self._clock = clock
        self._turns = SessionLoop(rows, rate_scale)
        self._changed = asyncio.Event()
        self._prepared: PlannedRequest | None = None

    async def next(self) -> PlannedRequest | None:
        while not self._turns.is_over:
            self._changed.clear()
            turn = self._turns.peek()
            if turn is None:
                await self._changed.wait()
                continue
            planned = self._prepare(turn)
            wait_s = planned.due_s - self._clock()
            if wait_s <= 0 or not await self._changes_within(wait_s):
                self._turns.pop()
                self._prepared = None
                return planned
        return None

    def finished(self, planned: PlannedRequest, finish_s: float) -> None:
        """The session's next turn becomes due after its think time."""
        self._turns.ended(Turn(planned.due_s, planned.index, planned.row), finish_s)
        self._changed.set()

    def _prepare(self, turn: Turn) -> PlannedRequest:
        """Make the body of the earliest turn while it waits; once, unless an earlier one comes between."""
        if self._prepared is None or self._prepared.index != turn.number:
            body = self._make_body(turn.number, turn.row)
            self._prepared = PlannedRequest(turn.number, turn.row, turn.due_s, body)
        return self._prepared

    async def _changes_within(self, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return self._changed.is_set()  # an answer may have come while this task waited for its turn
        return True
