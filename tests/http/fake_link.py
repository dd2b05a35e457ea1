"""A replica of one thread: deterministic tokens at a settable pace, able to freeze, die and be slow.

The output of a request is a pure function of its prompt and seed, so that a test can compute the answer. It
keeps the contract of `ReplicaLink`: every request submitted ends in exactly one `Finished`, unless it dies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.events import Admitted, Finished, PhaseTimes, ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.step import TokenLogprobs
from penstock.replica.messages import Advice, ReplicaDied, ReplicaInfo, ReplicaStats, StepReport

ALPHABET = b"abcdefghijklmnopqrstuvwxyz "


def make_info(**changes: object) -> ReplicaInfo:
    values: dict[str, object] = {
        "engine": "0",
        "model": "fake",
        "context_len_max": 4096,
        "kv_block_tokens": 16,
        "kv_blocks": 512,
        "kv_bytes": 1 << 20,
        "weights_bytes": 1 << 20,
        "running_max": 8,
        "step_tokens_max": 512,
        "device": "cpu",
        "dtype": "float32",
        "policies": {"rank": "fcfs"},
        "startup_s": {"load": 0.5},
        "fingerprint": "penstock-fake",
    }
    return ReplicaInfo(**{**values, **changes})  # type: ignore[arg-type]


def output_of(request: Request) -> list[int]:
    """The tokens this replica answers with: letters, chosen by prompt and (when not greedy) seed."""
    base = sum(request.prompt_tokens or ()) + (0 if request.sampling.is_greedy else request.sampling.seed)
    return [ALPHABET[(base + 7 * index) % len(ALPHABET)] for index in range(request.max_output_tokens)]


@dataclass
class Running:
    request: Request
    tokens: list[int]
    sent: int = 0
    admitted_s: float = 0.0


@dataclass
class FakeLink:
    """`step_s` is the pace; set `scripts[prompt text]` to answer a prompt with given token ids."""

    step_s: float = 0.001
    info: ReplicaInfo = field(default_factory=make_info)
    scripts: dict[bytes, list[int]] = field(default_factory=dict)
    fail_on: bytes | None = None  # a prompt with these bytes ends as FAILED

    def __post_init__(self) -> None:
        self._lock = threading.Condition()
        self._callback: Callable[[StepReport | ReplicaDied], None] | None = None
        self._arrived: list[Request] = []
        self._cancelled: dict[str, CancelReason] = {}
        self._running: dict[str, Running] = {}
        self._beat = 0
        self._is_closed = False
        self._is_dead = False
        self._is_frozen = threading.Event()
        self.submitted: list[Request] = []
        self.advised: list[Advice] = []
        self.cancels: list[tuple[str, CancelReason]] = []
        self.running_most = 0
        self._thread = threading.Thread(target=self._loop, name="fake-replica", daemon=True)
        self._thread.start()

    # The contract

    def on_report(self, callback: Callable[[StepReport | ReplicaDied], None]) -> None:
        self._callback = callback

    def submit(self, request: Request) -> None:
        with self._lock:
            self.submitted.append(request)
            self._arrived.append(request)
            self._lock.notify()

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        with self._lock:
            self.cancels.append((request_id, reason))
            self._cancelled[request_id] = reason
            self._lock.notify()

    def advise(self, advice: Advice) -> None:
        self.advised.append(advice)

    def heartbeat(self) -> int:
        return self._beat

    def is_alive(self) -> bool:
        return not self._is_dead

    def close(self, timeout_s: float) -> None:
        with self._lock:
            self._is_closed = True
            self._is_frozen.clear()
            self._lock.notify()
        self._thread.join(timeout_s)

    # What a test does to it

    def freeze(self) -> None:
        """The loop stands still, as inside a step that never ends."""
        self._is_frozen.set()

    def thaw(self) -> None:
        self._is_frozen.clear()

    def die(self) -> None:
        with self._lock:
            self._is_dead = True
            self._lock.notify()

    @property
    def running_count(self) -> int:
        return len(self._running)

    # The loop

    def _loop(self) -> None:
        while not self._is_closed:
            if self._is_frozen.is_set():
                time.sleep(0.005)
                continue
            self._beat += 1
            if self._is_dead:
                self._report(ReplicaDied("killed by a test"))
                return
            events = self._step()
            if events:
                self._report(StepReport(events, self._stats(len(events))))
            self._pause()

    def _pause(self) -> None:
        """The rest of a step's time; when idle, until something arrives (beating now and then)."""
        if self._running:
            time.sleep(self.step_s)
            return
        with self._lock:
            if not self._arrived and not self._cancelled:
                self._lock.wait(timeout=0.02)

    def _report(self, report: StepReport | ReplicaDied) -> None:
        if self._callback is not None:
            self._callback(report)

    def _step(self) -> list[ReplicaEvent]:
        now_s = time.monotonic()
        events: list[ReplicaEvent] = []
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, {}
        for request in arrived:
            prompt = bytes(token for token in request.prompt_tokens or () if token < 256)
            tokens = next((out for text, out in self.scripts.items() if text in prompt), output_of(request))
            self._running[request.id] = Running(request, tokens, admitted_s=now_s)
            events.append(Admitted(request.id, now_s, cached_len=len(prompt) // 2))
        self.running_most = max(self.running_most, len(self._running))
        for request_id, reason in cancelled.items():
            if request_id in self._running:
                end = FinishReason.STOP if reason is CancelReason.STOP_STRING else FinishReason.CANCELLED
                events.append(self._finish(request_id, end, now_s))
        for running in list(self._running.values()):
            events += self._advance(running, now_s)
        return events

    def _advance(self, running: Running, now_s: float) -> list[ReplicaEvent]:
        request = running.request
        if self.fail_on is not None and self.fail_on in bytes(request.prompt_tokens or ()):
            return [self._finish(request.id, FinishReason.FAILED, now_s)]
        token_id = running.tokens[running.sent]
        running.sent += 1
        events: list[ReplicaEvent] = [self._token(running, token_id, now_s)]
        if token_id in request.stop_token_ids:
            events.append(self._finish(request.id, FinishReason.STOP, now_s, token_id))
        elif running.sent == min(len(running.tokens), request.max_output_tokens):
            events.append(self._finish(request.id, FinishReason.LENGTH, now_s))
        return events

    def _token(self, running: Running, token_id: int, now_s: float) -> TokenOut:
        request = running.request
        event = TokenOut(request.id, now_s, token_id)
        if request.sampling.logprobs is not None:
            event.logprobs = self._scores(token_id, request.sampling.logprobs)
        if request.sampling.prompt_logprobs and running.sent == 1:
            event.prompt_logprobs = [
                self._scores(token, request.sampling.logprobs or 0)
                for token in (request.prompt_tokens or ())[1:]
            ]
        return event

    def _scores(self, token_id: int, count: int) -> TokenLogprobs:
        top = tuple((ALPHABET[rank], -1.0 - rank) for rank in range(count))
        return TokenLogprobs(logprob=-0.5, top=top)

    def _finish(
        self, request_id: str, reason: FinishReason, now_s: float, stop_token_id: int | None = None
    ) -> Finished:
        running = self._running.pop(request_id)
        return Finished(
            request_id,
            now_s,
            reason,
            running.request.prompt_len,
            running.sent,
            cached_tokens=0,
            phases=PhaseTimes(decode_s=now_s - running.admitted_s),
            stop_token_id=stop_token_id,
            detail="made to fail" if reason is FinishReason.FAILED else None,
        )

    def _stats(self, step_tokens: int) -> ReplicaStats:
        return ReplicaStats(
            step_index=self._beat,
            running=len(self._running),
            kv_blocks_used=len(self._running),
            kv_blocks_free=self.info.kv_blocks - len(self._running),
            step_tokens=step_tokens,
            step_s=self.step_s,
        )
