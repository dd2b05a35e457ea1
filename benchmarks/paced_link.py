"""A replica that emits tokens at a fixed pace and remembers when: the gateway's cost without an engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.events import Admitted, Finished, ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.replica.messages import Advice, ReplicaDied, ReplicaInfo, ReplicaStats, StepReport


@dataclass
class Emitted:
    """One request: when it came, and when each of its tokens was reported. Monotonic seconds."""

    request: Request
    submitted_s: float
    tokens_s: list[float] = field(default_factory=list)


class PacedLink:
    """A `ReplicaLink`. Each request gets a token every `period_s`, in one of `groups` steps per period.

    One group is an engine whose sequences all advance in one step; many groups spread the same tokens evenly
    over time, as several engines out of phase would.
    """

    def __init__(self, info: ReplicaInfo, token_id: int, period_s: float, groups: int) -> None:
        self.info = info
        self.emitted: list[Emitted] = []
        self._token_id = token_id
        self._tick_s = period_s / groups
        self._groups: list[dict[str, Emitted]] = [{} for _ in range(groups)]
        self._inbox: deque[Request | str] = deque()  # requests, and ids to cancel; appends are atomic
        self._callback: Callable[[StepReport | ReplicaDied], None] | None = None
        self._ticks = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="paced-replica", daemon=True)

    def on_report(self, callback: Callable[[StepReport | ReplicaDied], None]) -> None:
        self._callback = callback
        self._thread.start()

    def submit(self, request: Request) -> None:
        self.emitted.append(Emitted(request, time.monotonic()))
        self._inbox.append(request)

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        self._inbox.append(request_id)

    def advise(self, advice: Advice) -> None:
        raise NotImplementedError("nothing here pins KV")

    def heartbeat(self) -> int:
        return self._ticks

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, timeout_s: float) -> None:
        self._is_closed = True
        self._thread.join(timeout_s)

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._is_closed:
            due_s += self._tick_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            self._ticks += 1
            events = self._take_inbox()
            self._advance(self._groups[self._ticks % len(self._groups)], events)
            if events:
                self._report(events)

    def _take_inbox(self) -> list[ReplicaEvent]:
        events: list[ReplicaEvent] = []
        now_s = time.monotonic()
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                events += self._drop(item, now_s)
                continue
            entry = next(each for each in reversed(self.emitted) if each.request is item)
            min(self._groups, key=len)[item.id] = entry
            events.append(Admitted(item.id, now_s, 0))
        return events

    def _drop(self, request_id: str, now_s: float) -> list[ReplicaEvent]:
        for group in self._groups:
            if (entry := group.pop(request_id, None)) is not None:
                return [self._finished(entry, FinishReason.CANCELLED, now_s)]
        return []

    def _advance(self, group: dict[str, Emitted], events: list[ReplicaEvent]) -> None:
        now_s = time.monotonic()
        for request_id, entry in list(group.items()):
            events.append(TokenOut(request_id, now_s, self._token_id))
            entry.tokens_s.append(now_s)
            if len(entry.tokens_s) == entry.request.max_output_tokens:
                del group[request_id]
                events.append(self._finished(entry, FinishReason.LENGTH, now_s))

    def _finished(self, entry: Emitted, reason: FinishReason, now_s: float) -> Finished:
        request = entry.request
        return Finished(request.id, now_s, reason, request.prompt_len, len(entry.tokens_s), 0)

    def _report(self, events: list[ReplicaEvent]) -> None:
        assert self._callback is not None
        running = sum(map(len, self._groups))
        self._callback(StepReport(events, ReplicaStats(step_index=self._ticks, running=running)))
