"""Clients that wait: an event loop in virtual time in which answers decide what is sent next.

A request may be sent once every busy replica's clock is at or past its due time: whatever ends before that
is known then. Until it is, the replica that is furthest behind makes a step. A leap of one replica ends
where another one might answer, so that replicas see each other's consequences in order; with many replicas
a closed loop therefore costs more than an open one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from penstock.core.metrics import RequestOutcome
from penstock.twin.replica import TwinReplica
from penstock.twin.requests import RequestMaker, request_id_of
from penstock.workloads.sessions import Turn, Turns

_NEVER = float("inf")


class ClosedLoop:
    """Sends turns to replicas in virtual time. An outcome's arrival is the instant its turn was due.

    `concurrency_max` bounds the requests in flight, from sending to the client's last byte; who is due
    beyond it waits, in order of due time, and that wait counts as latency, as in a live replay.
    """

    def __init__(
        self,
        turns: Turns,
        maker: RequestMaker,
        concurrency_max: int | None,
        on_outcome: Callable[[RequestOutcome], None],
    ) -> None:
        assert concurrency_max is None or concurrency_max >= 1
        self._turns = turns
        self._maker = maker
        self._slots_unused = concurrency_max  # None: no cap
        self._slots_freed_s: list[float] = []  # when slots that were used became free again
        self._on_outcome = on_outcome
        self._in_flight: dict[str, Turn] = {}
        self._busy: list[tuple[float, int]] = []  # (next_s, replica), with entries that time has overtaken
        self._sent = 0
        self._fleet: Sequence[TwinReplica] = ()

    def serve(self, fleet: Sequence[TwinReplica]) -> None:
        """Send everything and serve it. The replicas report to `ended`."""
        self._fleet = fleet
        while not self._turns.is_over or self._in_flight:
            send_s, busy_s = self._next_send_s(), self._next_busy_s()
            assert send_s < _NEVER or busy_s < _NEVER, "somebody can always go on"
            if send_s <= busy_s:
                self._send(send_s)
                continue
            _, index = heapq.heappop(self._busy)
            fleet[index].proceed(min(send_s, self._next_busy_s()))
            self._file(index)
        for replica in fleet:
            replica.finish()

    def ended(self, outcome: RequestOutcome) -> None:
        """A replica's report: the client has its answer, its slot is free, and its session goes on."""
        turn = self._in_flight.pop(outcome.request_id)
        outcome.arrival_s = turn.due_s
        if self._slots_unused is not None:
            heapq.heappush(self._slots_freed_s, outcome.finish_s)
        self._turns.ended(turn, outcome.finish_s)
        self._on_outcome(outcome)

    def _next_send_s(self) -> float:
        """When the next turn can leave, as far as is known."""
        turn = self._turns.peek()
        if turn is None:
            return _NEVER
        if self._slots_unused is None or self._slots_unused > 0:
            return turn.due_s
        return max(turn.due_s, self._slots_freed_s[0]) if self._slots_freed_s else _NEVER

    def _send(self, now_s: float) -> None:
        turn = self._turns.pop()
        if self._slots_unused:
            self._slots_unused -= 1
        elif self._slots_unused is not None:
            heapq.heappop(self._slots_freed_s)
        index = self._sent % len(self._fleet)
        self._sent += 1
        self._in_flight[request_id_of(turn.number)] = turn
        self._fleet[index].arrive(self._maker.make(turn.number, turn.row, now_s), turn.row.output_tokens)
        self._file(index)

    def _file(self, index: int) -> None:
        next_s = self._fleet[index].next_s
        if next_s < _NEVER:
            heapq.heappush(self._busy, (next_s, index))

    def _next_busy_s(self) -> float:
        """When the replica that is furthest behind acts next."""
        busy, fleet = self._busy, self._fleet
        while busy and fleet[busy[0][1]].next_s != busy[0][0]:
            heapq.heappop(busy)
        return busy[0][0] if busy else _NEVER
