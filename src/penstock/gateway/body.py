"""Read a JSON body from somebody we do not trust: bounded in bytes, in time and in total."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from penstock.core.errors import (
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)
from penstock.core.settings import GatewaySettings
from penstock.core.units import format_bytes


class BodyBudget:
    """Bytes of request bodies in memory at once, over all connections. One event loop owns it."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes_held = 0

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Account for one body; everything is given back on exit."""
        hold = Hold(self)
        try:
            yield hold
        finally:
            self._bytes_held -= hold.bytes_held
            assert self._bytes_held >= 0, "given back once"

    @property
    def bytes_held(self) -> int:
        return self._bytes_held

    def take(self, count_bytes: int) -> None:
        """Raises Overloaded when it does not fit; `Hold` is who calls this."""
        if self._bytes_held + count_bytes > self._bytes_max:
            raise Overloaded(
                "The server is full: too many bytes of request bodies are arriving.",
                hint="Retry after the time in `Retry-After`.",
                retry_after_s=1.0,
            )
        self._bytes_held += count_bytes


class Hold:
    """One body's share of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.bytes_held = 0

    def take(self, count_bytes: int) -> None:
        self._budget.take(count_bytes)
        self.bytes_held += count_bytes


async def read_body(request: Request, hold: Hold, settings: GatewaySettings) -> bytearray:
    """The raw body of a request that is declared as JSON.

    Raises InvalidRequest, PayloadTooLarge, RequestTimeout, UnsupportedMediaType, Overloaded, and lets
    ClientDisconnect through.
    """
    _check_media_type(request)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await _read_bounded(request, hold, settings.body_bytes_max)
    except TimeoutError:
        raise RequestTimeout(
            f"The request body did not arrive within {settings.body_timeout_s:g} s.",
            hint="Send it again.",
        ) from None


def parse_json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Strict JSON: no NaN, no lone surrogates, bounded depth (the parser's own). Raises InvalidRequest.

    Where a key is given twice the last one counts, as in most parsers.
    """
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"The request body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            hint="Send one JSON object in UTF-8.",
        ) from None
    if not isinstance(payload, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return payload


def _check_media_type(request: Request) -> None:
    """JSON or undeclared. A form or plain text is refused: browsers send those across sites unasked."""
    declared = request.headers.get("content-type", "application/json")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(
            f"The request body is declared as `{media_type[:100]}`.",
            hint="Send the header `Content-Type: application/json`.",
        )


async def _read_bounded(request: Request, hold: Hold, bytes_max: int) -> bytearray:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > bytes_max:
        raise _too_large(bytes_max)
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        hold.take(len(chunk))
        if len(body) + len(chunk) > bytes_max:
            raise _too_large(bytes_max)
        body += chunk
    return body


def _too_large(bytes_max: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The request body is larger than {format_bytes(bytes_max)}.",
        hint="Send less, or raise `gateway.body_bytes_max`.",
    )
