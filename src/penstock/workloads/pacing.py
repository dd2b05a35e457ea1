"""When each request of a replay is due: recorded instants (open loop), or think time after answers."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from penstock.core.errors import TraceError
from penstock.workloads.exchange import PlannedRequest
from penstock.workloads.trace import TraceRow

LOOKAHEAD_REQUESTS = 64  # bodies made before they are due, so that a burst does not wait for them
CLOSED_LOOP_ROWS_MAX = 1_000_000

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


class _Turn(NamedTuple):
    due_s: float
    number: int  # the row's index in the replay
    row: TraceRow


class ClosedLoop:
    """Turn k+1 of a session is due at finish(k) + think time; first turns and single requests as recorded.

    Think time is arrival(k+1) − arrival(k) − elapsed(k), never below 0; where the trace has no response
    times it is the whole gap. A failed turn is followed by the next one all the same. All rows are held
    in memory, since any session may be waiting for its next turn.
    """

    def __init__(
        self, rows: Iterator[TraceRow], make_body: BodyMaker, clock: Clock, rate_scale: float
    ) -> None:
        """`rate_scale` is what the arrivals were already divided by; think times are not. Reads all rows."""
        self._make_body = make_body
        self._clock = clock
        self._due: list[_Turn] = []
        self._later: dict[str, deque[_Turn]] = {}  # per session; `due_s` is the think time before the turn
        self._changed = asyncio.Event()
        self._prepared: PlannedRequest | None = None
        self._load(rows, rate_scale)

    def _load(self, rows: Iterator[TraceRow], rate_scale: float) -> None:
        last: dict[str, TraceRow] = {}
        for index, row in enumerate(rows):
            if index >= CLOSED_LOOP_ROWS_MAX:
                raise TraceError(
                    f"a closed loop holds its rows in memory, at most {CLOSED_LOOP_ROWS_MAX}.",
                    hint="cut the trace with `--window` or `--limit`",
                )
            previous = last.get(row.session_id) if row.session_id is not None else None
            if row.session_id is not None:
                last[row.session_id] = row
            if row.session_id is None or previous is None:
                self._due.append(_Turn(row.arrival_s, index, row))
            else:
                gap_s = (row.arrival_s - previous.arrival_s) * rate_scale
                think_s = max(0.0, gap_s - (previous.elapsed_s or 0.0))
                self._later.setdefault(row.session_id, deque()).append(_Turn(think_s, index, row))
        heapq.heapify(self._due)

    async def next(self) -> PlannedRequest | None:
        while self._due or self._later:
            self._changed.clear()
            if not self._due:
                await self._changed.wait()
                continue
            planned = self._prepare(self._due[0])
            wait_s = planned.due_s - self._clock()
            if wait_s <= 0 or not await self._changes_within(wait_s):
                heapq.heappop(self._due)
                self._prepared = None
                return planned
        return None

    def finished(self, planned: PlannedRequest, finish_s: float) -> None:
        """The session's next turn becomes due after its think time."""
        session_id = planned.row.session_id
        turns = self._later.get(session_id) if session_id is not None else None
        if session_id is None or not turns:
            return
        turn = turns.popleft()
        if not turns:
            del self._later[session_id]
        heapq.heappush(self._due, turn._replace(due_s=finish_s + turn.due_s))
        self._changed.set()

    def _prepare(self, turn: _Turn) -> PlannedRequest:
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
            return False
        return True
