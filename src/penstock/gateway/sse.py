"""Server-sent events, as OpenAI's clients parse them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from penstock.core.errors import PenstockError

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment line, which clients skip
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def encode_event(payload: Mapping[str, Any]) -> bytes:
    """One event; JSON text has no raw line breaks, so it needs no splitting."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def encode_events(payloads: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(map(encode_event, payloads))


def encode_error(error: PenstockError) -> bytes:
    """The last event of a stream that failed after its first byte; the connection closes behind it."""
    return encode_event(error.wire())
