"""uvicorn's HTTP/1.1 protocol with the bounds it leaves open: size and time of headers, unread answers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from penstock.core.errors import HeadersTooLarge, InvalidRequest, RequestError
from penstock.core.settings import GatewaySettings
from penstock.gateway.answer import ABORT_EXTENSION


class GatewayProtocol(HttpToolsProtocol):
    """One connection. Its limits are the settings of the app that it serves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits: GatewaySettings = cast(Any, self.config.app).state.gateway.settings.gateway
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._unread_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_timer is not None:
            # One read may carry a body behind the headers, so it is judged by what came before it.
            if self._header_bytes > self._limits.header_bytes_max:
                self._refuse(HeadersTooLarge("The request's headers are too large."))
                return
            self._header_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._header_timer is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._stop_header_timer()
        scope = cast(dict[str, Any], self.scope)
        scope.setdefault("extensions", {})[ABORT_EXTENSION] = self.transport.abort
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("The request is not valid HTTP."))

    def timeout_keep_alive_handler(self) -> None:
        """Idle after an answer: close; but an answer that the client has not read yet gets its time."""
        if self.transport.is_closing():
            return
        if not self.transport.get_write_buffer_size():
            self.transport.close()
        elif self._unread_s >= self._limits.write_stall_s:
            self.transport.abort()
        else:
            self._unread_s += self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._header_timer = self.loop.call_later(self._limits.header_timeout_s, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, error: RequestError) -> None:
        """Answer below the app, which never saw a request, and close."""
        body = orjson.dumps(error.wire())
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[error.status] + head % len(body) + body)
        self.transport.close()
