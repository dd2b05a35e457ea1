"""The answer to one generation request, streamed or whole, as an ASGI response.

    open the call ─► wait for the first event (errors still get their own status) ─► headers ─► deltas ─► end

A second task listens for the client's disconnect from the first moment, so a request that nobody waits for
any more is cancelled at once: queued or running, streamed or not. The status and headers of a stream are held
until the first token, so that they can tell queue time and cached tokens; but no longer than `keepalive_s`,
after which the stream begins with a comment line, for the sake of proxies that close silent connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from penstock.core.errors import PenstockError
from penstock.core.reasons import CancelReason
from penstock.gateway import sse
from penstock.gateway.errors import internal_error
from penstock.gateway.inflight import Call, Delta
from penstock.gateway.render import Renderer, Whole
from penstock.gateway.switchboard import Switchboard

ABORT_EXTENSION = "penstock.abort"  # in the scope: closes the connection without waiting for the client


class ClientGone(Exception):
    """The client left; there is nobody to answer. Never leaves this module."""


class Answer(Response):
    """Runs one call to its end. Use once."""

    def __init__(
        self,
        call: Call,
        renderer: Renderer,
        switchboard: Switchboard,
        clock: Callable[[], float],
        *,
        engine: str,
        keepalive_s: float,
        deadline_s: float | None = None,
        extra_headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._call = call
        self._renderer = renderer
        self._switchboard = switchboard
        self._clock = clock
        self._engine = engine
        self._keepalive_s = keepalive_s
        self._deadline_s = deadline_s
        self._extra_headers = extra_headers or {}
        self._arrival_s = call.plan.requests[0].arrival_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Errors before the first byte are raised to the app's handlers."""
        call = self._call
        call.close_connection = scope.get("extensions", {}).get(ABORT_EXTENSION)
        opened_s = self._clock()
        self._switchboard.open(call)
        watcher = asyncio.create_task(self._watch_disconnect(receive))
        timer = self._start_deadline()
        try:
            if call.plan.is_stream:
                await self._send_stream(send, opened_s)
            else:
                await self._send_whole(send, opened_s)
        except ClientGone:
            pass
        finally:
            if timer is not None:
                timer.cancel()
            watcher.cancel()
            self._switchboard.close(call)

    def _start_deadline(self) -> asyncio.TimerHandle | None:
        if self._deadline_s is None:
            return None
        left_s = self._deadline_s - (self._clock() - self._arrival_s)
        loop = asyncio.get_running_loop()
        return loop.call_later(max(0.0, left_s), self._switchboard.expire, self._call, self._deadline_s)

    async def _watch_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._switchboard.leave(self._call, CancelReason.CLIENT_DISCONNECT)

    async def _send_whole(self, send: Send, opened_s: float) -> None:
        answers = [Whole(choice.index) for choice in self._call.choices]
        while not self._call.is_over:
            for delta in await self._next_deltas():
                answers[delta.index].add(delta)
        body = orjson.dumps(self._renderer.whole(answers, self._call.usage))
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        overhead_s = opened_s - self._arrival_s + self._clock() - self._last_token_s()
        await send(self._start(headers, overhead_s))
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send, opened_s: float) -> None:
        first = await self._wait_first(opened_s)
        headers = {"content-type": sse.MEDIA_TYPE, **sse.HEADERS}
        await send(self._start(headers, opened_s - self._arrival_s))
        try:
            await self._send_deltas(send, first, opened_s)
        except PenstockError as error:
            await self._send(send, sse.encode_error(error), is_last=True)
        except ClientGone:
            raise
        except Exception:  # a bug of ours: the client is told, and the log gets the rest
            await self._send(send, sse.encode_error(internal_error(self._call.plan.id)), is_last=True)
            raise

    async def _wait_first(self, opened_s: float) -> list[Delta]:
        """Deltas of the first event, or none once a keep-alive is due. Raises what the call failed with."""
        while True:
            deltas = await self._next_deltas()
            has_begun = any(choice.output_tokens for choice in self._call.choices)
            if deltas or has_begun or self._clock() - opened_s >= self._keepalive_s:
                return deltas

    async def _send_deltas(self, send: Send, deltas: list[Delta], sent_s: float) -> None:
        """One write for all that is new, a comment line when nothing is for long, and the stream's end."""
        data = self._encode(deltas)
        while not self._call.is_over:
            if not data and self._clock() - sent_s >= self._keepalive_s:
                data = sse.KEEP_ALIVE
            if data:
                await self._send(send, data)
                sent_s = self._clock()
            data = self._encode(await self._next_deltas())
        if self._call.plan.has_usage_chunk:
            data += sse.encode_event(self._renderer.usage_chunk(self._call.usage))
        await self._send(send, data + sse.DONE, is_last=True)

    async def _next_deltas(self) -> list[Delta]:
        deltas = await self._call.next_deltas()
        if self._call.gone is not None:
            raise ClientGone
        return deltas

    async def _send(self, send: Send, data: bytes, is_last: bool = False) -> None:
        """Write, and let the switchboard see for how long the client has not read."""
        self._call.sending_since_s = self._clock()
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})
        self._call.sending_since_s = None

    def _encode(self, deltas: list[Delta]) -> bytes:
        return b"".join(sse.encode_events(self._renderer.chunks(delta)) for delta in deltas)

    def _start(self, headers: dict[str, str], overhead_s: float) -> Message:
        """Status 200 with what is known by now."""
        call = self._call
        known = {
            "x-penstock-engine": self._engine,
            "x-penstock-cached-tokens": str(call.cached_tokens),
            "x-penstock-overhead-ms": _ms(overhead_s),
            **self._extra_headers,
            **headers,
        }
        queue_s = self._queue_s()
        if queue_s is not None:
            known["x-penstock-queue-ms"] = _ms(queue_s)
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in known.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}

    def _queue_s(self) -> float | None:
        """Wait of the first choice, at desk and engine: its TTFT less its prefill, each on its own clock."""
        progress = self._call.choices[0].progress
        if progress.first_token_s is None or progress.engine_first_s is None:
            return None
        prefill_s = progress.engine_first_s - (progress.engine_admitted_s or progress.engine_first_s)
        return max(0.0, progress.first_token_s - self._arrival_s - prefill_s)

    def _last_token_s(self) -> float:
        now_s = self._clock()
        return max(choice.progress.last_token_s or now_s for choice in self._call.choices)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
