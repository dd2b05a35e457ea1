"""One request sent and its streamed answer read: from bytes on the wire to a `RequestOutcome`."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import FinishReason
from penstock.workloads.sse import EventTooLarge, SseParser
from penstock.workloads.target import Target
from penstock.workloads.trace import TraceRow

ERROR_BODY_BYTES_MAX = 1 << 16
ERROR_CODE_CHARS_MAX = 48
TOOL_CHARS_MAX = 128  # that a server of ours takes
_REFUSALS = frozenset({*range(400, 500), 503})  # the server said no; other statuses are failures


@dataclass(slots=True, repr=False)
class PlannedRequest:
    """A request ready to go: `due_s` on the run's clock, `body` the bytes to post."""

    index: int
    row: TraceRow
    due_s: float
    body: bytes


@dataclass(slots=True)
class Exchange:
    """What was asked, when it really left, and what came of it."""

    asked: TraceRow
    sent_s: float
    outcome: RequestOutcome
    chunks: int
    usage: bool  # the server stated token counts


@dataclass(slots=True)
class StreamReading:
    """The state of one answer being read; `event` takes its payloads in order."""

    first_s: float | None = None
    last_s: float | None = None
    itl_s: array[float] = field(default_factory=lambda: array("f"))
    chunks: int = 0
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    error_code: str | None = None

    def event(self, payload: bytes, now_s: float) -> int:
        """Take one event in; returns how many pieces of output it carried. Never raises."""
        if payload == b"[DONE]":
            return 0
        try:
            message = json.loads(payload)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.error_code = "bad_stream"
            return 0
        if message.get("error"):
            self.error_code = error_code_of(message, "stream_error")
            return 0
        if isinstance(message.get("usage"), dict):
            self._take_usage(message["usage"])
        choices = message.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return 0
        return self._take_choice(choices[0], now_s)

    def _take_choice(self, choice: dict[str, Any], now_s: float) -> int:
        reason = choice.get("finish_reason")
        delta = choice.get("delta")
        if isinstance(delta, dict):
            # A chat chunk that only names the role carries no output yet.
            has_output = any(delta.get(key) for key in ("content", "reasoning_content", "tool_calls"))
        else:
            # A completion chunk without text is a token whose characters are still held back.
            has_output = bool(choice.get("text")) or (reason is None and "text" in choice)
        if isinstance(reason, str):
            self.finish_reason = reason
        if has_output:
            self._take_output(now_s)
        return int(has_output)

    def _take_output(self, now_s: float) -> None:
        self.chunks += 1
        if self.last_s is None:
            self.first_s = now_s
        else:
            self.itl_s.append(now_s - self.last_s)
        self.last_s = now_s

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
        self.output_tokens = _count(usage.get("completion_tokens"), self.output_tokens)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.cached_tokens = _count(details.get("cached_tokens"), 0) or 0


def _count(value: Any, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 1 << 40 else otherwise


def error_code_of(body: Any, otherwise: str) -> str:
    """The `code` (or `type`) of an error body, made safe to print; `otherwise` where there is none."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        for key in ("code", "type"):
            value = error.get(key)
            if isinstance(value, str | int) and not isinstance(value, bool):
                safe = "".join(c for c in str(value) if c.isascii() and (c.isalnum() or c in "_-."))
                if safe:
                    return safe[:ERROR_CODE_CHARS_MAX]
    return otherwise


class Sender:
    """Posts planned requests and reads their answers. `clock` gives seconds since the run began."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        target: Target,
        clock: Callable[[], float],
        timeout_s: float,
        on_output: Callable[[int], None],
    ) -> None:
        self._client = client
        self._target = target
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_output = on_output

    async def send(self, planned: PlannedRequest) -> Exchange:
        """Always returns: whatever goes wrong on the wire becomes the outcome's `error_code`.

        The arrival is the instant the request was due, not the one it left: a client that lags must not
        flatter the server (coordinated omission). Cancelling the task gives a CANCELLED outcome.
        """
        reading = StreamReading()
        sent_s = self._clock()
        refused = False
        try:
            async with asyncio.timeout(self._timeout_s):
                refused = await self._post(planned, reading)
        except TimeoutError:
            reading.error_code = "client_timeout"
        except httpx.ConnectError:
            reading.error_code = "connect_error"
        except EventTooLarge:
            reading.error_code = "bad_stream"
        except (httpx.HTTPError, OSError):
            reading.error_code = "connection_lost"
        except asyncio.CancelledError:
            reading.error_code = "interrupted"
        return self._exchange(planned, reading, sent_s, refused)

    async def _post(self, planned: PlannedRequest, reading: StreamReading) -> bool:
        """Fill `reading`; returns whether the server refused the request."""
        headers = _headers_of(planned)
        async with self._client.stream(
            "POST", self._target.url, content=planned.body, headers=headers
        ) as response:
            if response.status_code != 200:
                body = await _read_start(response)
                reading.error_code = _status_code(response.status_code, body)
                return response.status_code in _REFUSALS
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                reading.error_code = "not_a_stream"
                return False
            parser = SseParser()
            async for received in response.aiter_raw():
                now_s = self._clock()
                outputs = sum(reading.event(payload, now_s) for payload in parser.feed(received))
                if outputs:
                    self._on_output(outputs)
        return False

    def _exchange(
        self, planned: PlannedRequest, reading: StreamReading, sent_s: float, refused: bool
    ) -> Exchange:
        if reading.error_code is None and reading.finish_reason is None:
            reading.error_code = "stream_cut"
        finish_s = self._clock()
        first_s, last_s = reading.first_s, reading.last_s
        if first_s is None and reading.output_tokens:
            first_s = last_s = finish_s  # all text was held back until the end
        row = planned.row
        outcome = RequestOutcome(
            request_id=request_id_of(planned.index),
            arrival_s=planned.due_s,
            finish=_finish_of(reading, refused),
            finish_s=finish_s,
            prompt_tokens=row.prompt_tokens if reading.prompt_tokens is None else reading.prompt_tokens,
            output_tokens=reading.chunks if reading.output_tokens is None else reading.output_tokens,
            cached_tokens=reading.cached_tokens,
            first_token_s=first_s,
            last_token_s=last_s,
            itl_s=reading.itl_s,
            tenant=row.tenant,
            slo_class=row.slo_class,
            error_code=reading.error_code,
        )
        return Exchange(row, sent_s, outcome, reading.chunks, reading.output_tokens is not None)


def request_id_of(index: int) -> str:
    return f"replay-{index}"


def _headers_of(planned: PlannedRequest) -> dict[str, str]:
    """Tenant and class travel in the headers that inference gateways use, what is told of an agent in ours.

    Servers may ignore them.
    """
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id_of(planned.index)}
    for header, name in (
        ("x-gateway-inference-fairness-id", planned.row.tenant),
        ("x-gateway-inference-objective", planned.row.slo_class),
    ):
        if name != "default" and _fits_header(name):
            headers[header] = name
    tool = planned.row.tool
    if tool is not None and _fits_header(tool[:TOOL_CHARS_MAX]):
        headers["x-penstock-tool"] = tool[:TOOL_CHARS_MAX]
    if planned.row.is_last_turn:
        headers["x-penstock-last-step"] = "true"
    return headers


def _fits_header(name: str) -> bool:
    """Of a name without control characters."""
    return name.isascii() and name.strip() == name


def _finish_of(reading: StreamReading, refused: bool) -> FinishReason:
    if reading.error_code == "interrupted":
        return FinishReason.CANCELLED
    if reading.error_code is not None:
        return FinishReason.REFUSED if refused else FinishReason.FAILED
    return FinishReason.LENGTH if reading.finish_reason == "length" else FinishReason.STOP


def _status_code(status: int, body: bytes) -> str:
    try:
        return error_code_of(json.loads(body), f"http_{status}")
    except (ValueError, RecursionError):
        return f"http_{status}"


async def _read_start(response: httpx.Response) -> bytes:
    received = bytearray()
    async for part in response.aiter_raw():
        received += part
        if len(received) >= ERROR_BODY_BYTES_MAX:
            break
    return bytes(received[:ERROR_BODY_BYTES_MAX])
