"""A small OpenAI-compatible server for the replay's tests: it counts, delays, refuses and cuts, on demand.

Plain asyncio on a free loopback port, so that a test can misbehave on the wire in ways a framework forbids.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """One completion request as the server saw it, on the server's clock."""

    at_s: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    raw: bytes


@dataclass
class FakeServer:
    """Behaviour by request number (0, 1, …): the first matching of these decides."""

    port: int = 0
    delay_s: float = 0.0  # before the first token
    gap_s: float = 0.0  # between tokens
    hold_until_in_flight: int = 0  # no first token before so many requests are here at once
    refuse: Callable[[int], int | None] = lambda number: None  # status to refuse with
    cut_after: Callable[[int], int | None] = lambda number: None  # tokens until the connection is cut
    tokenizer: Callable[[str], int] | None = None  # tokens of a text; None: no such endpoint
    chat_overhead: int = 0
    stop_at: int | None = None  # tokens after which the answer ends with `stop`
    metrics: str | None = None
    raw_answer: bytes | None = None  # sent instead of an answer
    models: tuple[str, ...] = ("fake",)
    seen: list[Seen] = field(default_factory=list)
    in_flight: int = 0
    in_flight_max: int = 0
    ended_at_s: dict[int, float] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(raw) if raw else {}
        if path == "/v1/models":
            self._send(writer, 200, {"object": "list", "data": [{"id": name} for name in self.models]})
        elif path == "/metrics" and self.metrics is not None:
            self._send(writer, 200, self.metrics)
        elif path == "/tokenize" and self.tokenizer is not None:
            self._send(writer, 200, {"count": self._count(body)})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            await self._complete(Seen(time.perf_counter(), path, headers, body, raw), writer)
        else:
            self._send(writer, 404, {"error": {"message": "no such path", "code": "not_found"}})

    def _count(self, body: dict[str, Any]) -> int:
        assert self.tokenizer is not None
        if "messages" in body:
            return self.chat_overhead + sum(self.tokenizer(item["content"]) for item in body["messages"])
        prompt = body["prompt"]
        return self.tokenizer(prompt) if isinstance(prompt, str) else len(prompt)

    def _prompt_tokens(self, body: dict[str, Any]) -> int:
        if isinstance(body.get("prompt"), list):
            return len(body["prompt"])
        return self._count(body) if self.tokenizer else 0

    async def _complete(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        number = len(self.seen)
        self.seen.append(seen)
        if self.raw_answer is not None:
            writer.write(self.raw_answer)
            writer.close()
            return
        if (status := self.refuse(number)) is not None:
            self._send(
                writer, status, {"error": {"message": "no", "type": "server_error", "code": "overloaded"}}
            )
            return
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            await self._stream(seen, number, writer)
        finally:
            self.in_flight -= 1
            self.ended_at_s[number] = time.perf_counter()

    async def _stream(self, seen: Seen, number: int, writer: asyncio.StreamWriter) -> None:
        is_chat = seen.path.endswith("chat/completions")
        wanted = seen.body.get("max_tokens") or seen.body["max_completion_tokens"]
        count = wanted if self.stop_at is None else min(wanted, self.stop_at)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        if is_chat:
            self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.delay_s)
        while self.in_flight_max < self.hold_until_in_flight:
            await asyncio.sleep(0.01)
        cut = self.cut_after(number)
        for index in range(count):
            if cut is not None and index >= cut:
                writer.close()
                return
            await asyncio.sleep(self.gap_s if index else 0)
            choice = {"delta": {"content": " x"}} if is_chat else {"text": " x"}
            self._event(writer, {"choices": [{"index": 0, "finish_reason": None} | choice], "usage": None})
        reason = "length" if count == wanted else "stop"
        last = {"delta": {}} if is_chat else {"text": ""}
        self._event(writer, {"choices": [{"index": 0, "finish_reason": reason} | last], "usage": None})
        usage = {"prompt_tokens": self._prompt_tokens(seen.body), "completion_tokens": count}
        self._event(writer, {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 1}}})
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        self._chunk(writer, b": keep-alive\n\ndata: " + json.dumps(message).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _send(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any] | str) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        kind = "text/plain" if isinstance(body, str) else "application/json"
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[FakeServer]:
    """The server on a free port, closed afterwards with all its connections."""
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await server.handle(reader, writer)
        finally:
            connections.discard(task)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 22)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
