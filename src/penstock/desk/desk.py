"""Who may enter, and who goes to the engine next.

The engine gets a short queue of its own (its running slots and `engine_ahead` more); everybody else waits
here, where a cancelled request costs nothing. Where the engine's `rank` policy reorders, it gets the whole
queue, to see all that it chooses from. The line is bounded in requests,
in tokens and in expected wait, and whatever enters leaves exactly once: released and finished, or cancelled.

Pure: time is handed in, nothing blocks. Entry and release cost O(log waiting).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from penstock.core.errors import ConcurrencyLimitExceeded, Overloaded, RequestExceedsCapacity
from penstock.core.reasons import ShedReason
from penstock.core.request import Request
from penstock.core.settings import DeskSettings
from penstock.desk.drain_rate import DrainRate
from penstock.desk.feasibility import Capacity

RankKey = Callable[[Request], tuple[float, ...]]

SPARE_DIVISOR = 8
RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 60.0


def rank_by_priority(request: Request) -> tuple[float, ...]:
    """Lower priority value first, then first come first served."""
    return (request.priority, request.arrival_s)


class Desk:
    """The line in front of one engine. Not thread safe: one owner calls it."""

    def __init__(
        self, settings: DeskSettings, capacity: Capacity, rank_key: RankKey = rank_by_priority
    ) -> None:
        self._settings = settings
        self._rank_key = rank_key
        self._slots = capacity.running_max
        self._takes_queue = capacity.takes_queue
        ahead = settings.queue_requests_max if capacity.takes_queue else settings.engine_ahead
        self._engine_window = capacity.running_max + ahead
        self._inside_tokens = 0
        self._waiting: dict[str, Request] = {}
        self._inside: dict[str, Request] = {}
        # Entries of cancelled requests stay in the heap until they surface or are compacted away.
        self._line: list[tuple[tuple[float, ...], int, str]] = []
        self._entry_count = 0
        self._waiting_tokens = 0
        self._tenant_counts: Counter[str] = Counter()
        self._drain = DrainRate()

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt and output tokens, at most, of everybody in the line."""
        return self._waiting_tokens

    @property
    def inside_count(self) -> int:
        """Requests released to the engine and not finished yet."""
        return len(self._inside)

    @property
    def engine_window(self) -> int:
        return self._engine_window

    @property
    def queued(self) -> tuple[int, int]:
        """(requests, tokens) that have not started, as far as the desk can tell.

        An engine that takes the whole queue says what it finished, not what it started: those beyond its
        slots count as queued, with their part of the tokens inside.
        """
        count, tokens = len(self._waiting), self._waiting_tokens
        if self._takes_queue and (behind := len(self._inside) - self._slots) > 0:
            return count + behind, tokens + self._inside_tokens * behind // len(self._inside)
        return count, tokens

    def _free_places(self) -> int:
        """How many may go on without queueing; below 0 where an engine holds the queue."""
        window = self._slots if self._takes_queue else self._engine_window
        return window - len(self._inside)

    def expected_wait_s(self, places: int) -> float | None:
        """How long until `places` finishes have happened; None while nothing was measured."""
        gap_s = self._drain.gap_s
        return None if gap_s is None else gap_s * places

    def check_room(self, count: int, tenant: str) -> None:
        """Raise what `enter` would for `count` requests of no tokens: a cheap look before tokenising."""
        self._check_ever(count, param="n")
        self._check_now(count, 0, tenant)

    def has_spare_room(self, tenant: str) -> bool:
        """Whether work that can wait may enter now. It leaves an eighth of the engine's slots free, and half
        of the places that the tenant may have at once, to those who come later and cannot wait.
        """
        tenant_max = self._settings.tenant_requests_max
        if tenant_max and self._tenant_counts[tenant] >= max(1, tenant_max // 2):
            return False
        return not self._waiting and len(self._inside) < self._slots - self._slots // SPARE_DIVISOR

    def enter(self, requests: Sequence[Request]) -> None:
        """Queue the choices of one call, all or none.

        Raises Overloaded or ConcurrencyLimitExceeded, with the reason and when to try again, and
        RequestExceedsCapacity for a call that would not fit even an idle desk.
        """
        assert requests and len({request.tenant for request in requests}) == 1, "one call, one tenant"
        tokens = sum(request.total_len_max for request in requests)
        self._check_ever(len(requests), param="n")
        self._check_now(len(requests), tokens, requests[0].tenant)
        for request in requests:
            assert request.id not in self._waiting and request.id not in self._inside, "ids are unique"
            self._entry_count += 1
            heapq.heappush(self._line, (self._rank_key(request), self._entry_count, request.id))
            self._waiting[request.id] = request
            self._waiting_tokens += request.total_len_max
            self._tenant_counts[request.tenant] += 1

    def release(self) -> list[Request]:
        """Take from the line, in order, as many as the engine's window has room for."""
        released = []
        while self._waiting and len(self._inside) < self._engine_window:
            _, _, request_id = heapq.heappop(self._line)
            request = self._waiting.pop(request_id, None)
            if request is None:
                continue  # cancelled while it waited
            self._waiting_tokens -= request.total_len_max
            self._inside[request_id] = request
            self._inside_tokens += request.total_len_max
            released.append(request)
        self._compact()
        return released

    def cancel(self, request_id: str) -> bool:
        """Take a request out of the line; False when it is not there (released, or unknown)."""
        request = self._waiting.pop(request_id, None)
        if request is None:
            return False
        self._waiting_tokens -= request.total_len_max
        self._leave(request)
        self._compact()
        return True

    def finish(self, request_id: str, now_s: float) -> None:
        """The engine is done with a released request, however it ended."""
        request = self._inside.pop(request_id, None)
        assert request is not None, "only a released request can finish, and only once"
        self._inside_tokens -= request.total_len_max
        self._leave(request)
        self._drain.finished(now_s, saturated=bool(self._waiting) or self._free_places() < 0)

    def clear(self) -> list[Request]:
        """The engine is gone: everybody leaves. Returns them, those inside first."""
        gone = [*self._inside.values(), *self._waiting.values()]
        self._inside.clear()
        self._waiting.clear()
        self._line.clear()
        self._tenant_counts.clear()
        self._waiting_tokens = self._inside_tokens = 0
        return gone

    def check_invariants(self) -> None:
        """Raise AssertionError when the desk's books do not add up. O(line)."""
        assert not self._waiting.keys() & self._inside.keys(), "a request is in one place"
        assert len(self._inside) <= self._engine_window, "the engine's window is a bound"
        assert self._waiting_tokens == sum(request.total_len_max for request in self._waiting.values())
        assert self._inside_tokens == sum(request.total_len_max for request in self._inside.values())
        assert self._waiting.keys() <= {entry[2] for entry in self._line}, "everybody waiting has a place"
        assert len(self._line) <= 2 * len(self._waiting), "cancelled entries are compacted"
        everybody = [*self._waiting.values(), *self._inside.values()]
        assert self._tenant_counts == Counter(request.tenant for request in everybody)

    def _check_ever(self, count: int, *, param: str) -> None:
        """Refuse what could not enter an idle desk either, so that nobody retries it for ever."""
        places = self._engine_window + (0 if self._takes_queue else self._settings.queue_requests_max)
        tenant_places = self._settings.tenant_requests_max or places
        if count > min(places, tenant_places):
            raise RequestExceedsCapacity(
                f"The call asks for {count} completions; at most {min(places, tenant_places)} fit at once.",
                hint="Ask for fewer choices or prompts in one call.",
                param=param,
            )

    def _check_now(self, count: int, tokens: int, tenant: str) -> None:
        tenant_max = self._settings.tenant_requests_max
        if tenant_max and self._tenant_counts[tenant] + count > tenant_max:
            raise ConcurrencyLimitExceeded(
                f"You have {self._tenant_counts[tenant]} requests in progress; the limit is {tenant_max}.",
                hint="Wait for one to finish.",
                retry_after_s=self._retry_after_s(count),
                reason=ShedReason.TENANT_CONCURRENCY,
            )
        places = len(self._waiting) + count - self._free_places()
        if places <= 0:
            return  # everybody can go straight to the engine
        queue_max = self._settings.queue_requests_max
        queued, queued_tokens = self.queued
        if places > queue_max:
            full = f"{queued} requests are waiting; the limit is {queue_max}."
            raise self._overloaded(full, ShedReason.QUEUE_REQUESTS, count)
        if queued and queued_tokens + tokens > self._settings.queue_tokens_max:
            full = f"{queued_tokens} tokens are waiting; the limit is {self._settings.queue_tokens_max}."
            raise self._overloaded(full, ShedReason.QUEUE_TOKENS, count)
        wait_s = self.expected_wait_s(places)
        if wait_s is not None and wait_s > self._settings.queue_wait_s_max:
            full = f"The expected wait is {wait_s:.0f} s; the limit is {self._settings.queue_wait_s_max:g} s."
            raise self._overloaded(full, ShedReason.QUEUE_WAIT, count)

    def _overloaded(self, message: str, reason: ShedReason, count: int) -> Overloaded:
        return Overloaded(
            f"The server is full: {message}",
            hint="Retry after the time in `Retry-After`.",
            retry_after_s=self._retry_after_s(count),
            reason=reason,
        )

    def _retry_after_s(self, count: int) -> float:
        """When to come back: once an eighth of the line, and the places the call needs, have been served.

        Coming back at the first free place would send every refused client into the same race.
        """
        places = max(count, self.queued[0] // 8)
        wait_s = self.expected_wait_s(places) or 0.0
        return min(max(wait_s, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)

    def _leave(self, request: Request) -> None:
        self._tenant_counts[request.tenant] -= 1
        if not self._tenant_counts[request.tenant]:
            del self._tenant_counts[request.tenant]

    def _compact(self) -> None:
        """Rebuild the heap once half of it is cancelled: O(1) amortised, and memory follows the live line."""
        if len(self._line) <= 2 * len(self._waiting):
            return
        self._line = [entry for entry in self._line if entry[2] in self._waiting]
        heapq.heapify(self._line)
