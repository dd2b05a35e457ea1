"""The gateway in virtual time: what `gateway/switchboard.py` decides, around the real desk.

Cancels are settled at once in the line, and told to the engine once otherwise; the engine's last word on a
request ends it; a dead engine ends everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.core.errors import Draining, NoHealthyEngine, PenstockError
from penstock.core.events import Finished, ReplicaEvent
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.settings import DeskSettings
from penstock.desk import Capacity, Desk, fit_output
from penstock.policies.stack import rank_class
from penstock.twin.vopr.checkers import ANSWERS, Checkers
from penstock.twin.vopr.content import requests_of
from penstock.twin.vopr.engine_host import Cancel, Command, Submit
from penstock.twin.vopr.journal import Journal
from penstock.twin.vopr.script import Call, System


@dataclass(slots=True, eq=False)
class _Open:
    """A call that is inside. `left`: requests that have not ended."""

    call: Call
    left: dict[str, Request]
    cancels_sent: set[str] = field(default_factory=set)


class Front:
    """Opens calls, hands requests over as the window has room, and ends each exactly once."""

    def __init__(
        self,
        system: System,
        send: Callable[[Command], None],
        engine_still_s: Callable[[], float],
        checkers: Checkers,
        journal: Journal,
    ) -> None:
        self._system = system
        self._send = send
        self._engine_still_s = engine_still_s  # for how long the engine's heartbeat has not moved
        self._checkers = checkers
        self._journal = journal
        self.capacity = Capacity(
            system.context_len,
            system.block_tokens,
            system.kv_blocks,
            system.running_max,
            takes_queue=rank_class(system.rank).reorders,
        )
        settings = DeskSettings(
            system.queue_requests_max,
            system.queue_tokens_max,
            system.queue_wait_s_max,
            system.tenant_requests_max,
            system.engine_ahead,
        )
        self.desk = Desk(settings, self.capacity)
        self.offered: set[str] = set()
        self.output_lens: dict[str, int] = {}
        self.is_draining = False
        self.is_dead = False
        self._calls: dict[str, _Open] = {}
        self._call_of: dict[str, _Open] = {}

    @property
    def open_count(self) -> int:
        return len(self._call_of)

    def open(self, call: Call) -> bool:
        """Let a call in, or refuse it. Returns whether it is inside."""
        requests = requests_of(call, max(1, call.output_tokens), self._system)
        self.offered |= {request.id for request in requests}
        try:
            self._check_ready()
            output_tokens = fit_output(
                call.prompt_tokens,
                call.output_tokens or None,
                self.capacity,
                prompt_param="prompt",
                output_param="max_tokens",
            )
            requests = requests_of(call, output_tokens, self._system)
            self.desk.enter(requests)
        except PenstockError as error:
            self._journal.note(f"refused {call.name}: {type(error).__name__}")
            self._checkers.refused(requests)
            return False
        self._journal.note(f"entered {call.name}")
        self._checkers.entered(call, requests)
        opened = _Open(call, {request.id: request for request in requests})
        self._calls[call.name] = opened
        for request in requests:
            self._call_of[request.id] = opened
            if not self._system.exact and call.stops_after_tokens:
                self.output_lens[request.id] = call.stops_after_tokens
        self._refill()
        return True

    def cancel(self, call_name: str, reason: CancelReason) -> None:
        """The client of a call is gone, for whatever reason. Twice, late or unknown: nothing happens."""
        opened = self._calls.get(call_name)
        if opened is None:
            return
        self._journal.note(f"cancel {call_name}: {reason}")
        for request_id in list(opened.left):
            if self.desk.cancel(request_id):
                self._end(request_id, FinishReason.CANCELLED)
            elif request_id not in opened.cancels_sent:
                opened.cancels_sent.add(request_id)
                self._send(Cancel(request_id, reason))
        self._checkers.after_desk(self.desk)

    def take(self, events: Sequence[ReplicaEvent], now_s: float) -> None:
        """A report of the engine."""
        for event in events:
            if isinstance(event, Finished):
                self._settle(event, now_s)
        self._refill()

    def bury(self) -> None:
        """The engine is gone: everybody is told."""
        self._journal.note("the engine died")
        self.is_dead = True
        for request in self.desk.clear():
            self._end(request.id, FinishReason.FAILED)
        self._checkers.after_desk(self.desk)

    def drain(self) -> None:
        self._journal.note("drain")
        self.is_draining = True

    def shut_down(self) -> None:
        """The drain's time is over: cut what is left."""
        for name in list(self._calls):
            self.cancel(name, CancelReason.SHUTDOWN)

    def _check_ready(self) -> None:
        if self.is_draining:
            raise Draining("The server is shutting down.")
        if self.is_dead or self._engine_still_s() > self._system.stall_s:
            raise NoHealthyEngine("The engine has died or is stuck.")

    def _settle(self, event: Finished, now_s: float) -> None:
        opened = self._call_of.get(event.request_id)
        self.desk.finish(event.request_id, now_s)
        self._end(event.request_id, event.reason)
        # One broken choice breaks its call.
        if opened is not None and event.reason not in ANSWERS:
            self.cancel(opened.call.name, CancelReason.ADMIN)

    def _end(self, request_id: str, reason: FinishReason) -> None:
        self._checkers.ended(request_id, reason)
        opened = self._call_of.pop(request_id)
        del opened.left[request_id]
        if not opened.left:
            del self._calls[opened.call.name]

    def _refill(self) -> None:
        if not self.is_dead:
            for request in self.desk.release():
                self._checkers.released(request)
                self._send(Submit(request))
        self._checkers.after_desk(self.desk)
