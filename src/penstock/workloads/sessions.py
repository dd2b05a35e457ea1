"""Which request is due next: as recorded (open loop), or a session's next turn after answer and think time.

The live replay and the twin ask the same objects, one with a real clock and one with a virtual one, so that
a closed loop means the same to both. Nothing here reads a clock or waits.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from penstock.core.errors import TraceError
from penstock.workloads.trace import TraceRow

CLOSED_LOOP_ROWS_MAX = 1_000_000


class Turn(NamedTuple):
    """One request to send. Ordered by due time, then by its place in the trace."""

    due_s: float
    number: int  # the row's index among those sent
    row: TraceRow


class Turns(Protocol):
    """Requests in the order they are due."""

    def peek(self) -> Turn | None:
        """The earliest turn that is known; None when there is none, for now or for good."""

    def pop(self) -> Turn:
        """Take what `peek` shows."""

    def ended(self, turn: Turn, finish_s: float) -> None:
        """A turn taken before has ended for its client, well or not."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to take, whatever ends."""


class RecordedOrder:
    """Arrivals as recorded; they never wait for answers. Holds one row."""

    def __init__(self, rows: Iterable[TraceRow]) -> None:
        self._rows: Iterator[tuple[int, TraceRow]] = enumerate(row for row in rows if not row.failed)
        self._next: Turn | None = None
        self._advance()

    def peek(self) -> Turn | None:
        return self._next

    def pop(self) -> Turn:
        turn = self._next
        assert turn is not None, "there is a turn to take"
        self._advance()
        return turn

    def ended(self, turn: Turn, finish_s: float) -> None:
        """Nothing follows from an answer in an open loop."""

    @property
    def is_over(self) -> bool:
        return self._next is None

    def _advance(self) -> None:
        number, row = next(self._rows, (0, None))
        self._next = None if row is None else Turn(row.arrival_s, number, row)


class SessionLoop:
    """Turn k+1 of a session is due at finish(k) + think time; first turns and single requests as recorded.

    Think time is arrival(k+1) − arrival(k) − elapsed(k), never below 0; where the trace has no response
    times it is the whole gap. A failed turn is followed by the next one all the same. All rows are held
    in memory, since any session may be waiting for its next turn.
    """

    def __init__(self, rows: Iterable[TraceRow], rate_scale: float) -> None:
        """`rate_scale` is what the arrivals were already divided by; think times are not. Reads all rows.

        Raises TraceError when there are more than CLOSED_LOOP_ROWS_MAX.
        """
        self._due: list[Turn] = []
        self._later: dict[str, deque[Turn]] = {}  # per session; `due_s` is the think time before the turn
        self._load((row for row in rows if not row.failed), rate_scale)

    def _load(self, rows: Iterator[TraceRow], rate_scale: float) -> None:
        last: dict[str, TraceRow] = {}
        for number, row in enumerate(rows):
            if number >= CLOSED_LOOP_ROWS_MAX:
                raise TraceError(
                    f"a closed loop holds its rows in memory, at most {CLOSED_LOOP_ROWS_MAX}.",
                    hint="cut the trace with `--window` or `--limit`",
                )
            previous = last.get(row.session_id) if row.session_id is not None else None
            if row.session_id is not None:
                last[row.session_id] = row
            if row.session_id is None or previous is None:
                self._due.append(Turn(row.arrival_s, number, row))
            else:
                gap_s = (row.arrival_s - previous.arrival_s) * rate_scale
                think_s = max(0.0, gap_s - (previous.elapsed_s or 0.0))
                self._later.setdefault(row.session_id, deque()).append(Turn(think_s, number, row))
        heapq.heapify(self._due)

    def peek(self) -> Turn | None:
        return self._due[0] if self._due else None

    def pop(self) -> Turn:
        return heapq.heappop(self._due)

    def ended(self, turn: Turn, finish_s: float) -> None:
        """The session's next turn becomes due after its think time."""
        session_id = turn.row.session_id
        turns = self._later.get(session_id) if session_id is not None else None
        if session_id is None or not turns:
            return
        following = turns.popleft()
        if not turns:
            del self._later[session_id]
        heapq.heappush(self._due, following._replace(due_s=finish_s + following.due_s))

    @property
    def is_over(self) -> bool:
        return not (self._due or self._later)
