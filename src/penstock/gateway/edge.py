"""The outermost ASGI layer: one id and one clock for each request, and no exception gets past it."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.gateway.errors import error_response, internal_error

logger = logging.getLogger(__name__)

_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")


def choose_request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's `X-Request-Id` if it is short and safe to put into headers and logs, else one of ours."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    if _SAFE_REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"req-{uuid.uuid4().hex}"


class Edge:
    """Sets `scope["state"]["request_id"]`; adds the headers `x-request-id` and `openai-processing-ms`."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float]) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = choose_request_id(scope["headers"])
        began_s = self._clock()
        scope.setdefault("state", {}).update(request_id=request_id)
        is_started = False

        async def send_marked(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                elapsed_ms = (self._clock() - began_s) * 1e3
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode("ascii")),
                    (b"openai-processing-ms", b"%d" % elapsed_ms),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception:
            logger.exception("request %s failed", request_id)
            if not is_started:
                await error_response(internal_error(request_id))(scope, receive, send_marked)
