"""Run the app: bind, serve, and shut down in stages.

SIGTERM or SIGINT    readiness goes false, new requests get 503 `draining`, streams go on
all done             exit 0
drain_timeout_s      what is left gets an error (streams as their last event), exit 1
a second signal      the same at once, exit 1
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from penstock.core.errors import Draining, EnvironmentMissing
from penstock.core.settings import GatewaySettings, Settings
from penstock.gateway.protocol import GatewayProtocol
from penstock.gateway.state import Gateway

BACKLOG = 4096
DRAIN_POLL_S = 0.05
FLUSH_S = 2.0  # for the last error events to reach their clients
KEEP_ALIVE_S = 30
EXIT_OK, EXIT_ABORTED = 0, 1

OnReady = Callable[[str], None]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises EnvironmentMissing when the address is taken."""
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise EnvironmentMissing(
            f"Cannot listen on `{host}` port {port}: {error.strerror or error}.",
            hint="Choose another with `--port`; 0 picks a free one.",
        ) from error
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a client on this machine reaches a bound socket."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_gateway(
    app: FastAPI,
    settings: Settings,
    *,
    sock: socket.socket | None = None,
    on_ready: OnReady | None = None,
) -> int:
    """Serve until a signal, drained; returns the exit code. `on_ready` gets the URL, with the real port."""
    bound = sock or bind(settings.gateway.host, settings.gateway.port)
    server = GatewayServer(app, settings.gateway, on_ready)
    server.run(sockets=[bound])
    return server.exit_code


class GatewayServer(uvicorn.Server):
    """uvicorn with our staged drain in place of its own signal handling."""

    def __init__(self, app: FastAPI, settings: GatewaySettings, on_ready: OnReady | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=GatewayProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(FLUSH_S),
            )
        )
        self._gateway: Gateway = app.state.gateway
        self._settings = settings
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.exit_code = EXIT_OK

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._on_ready is not None and sockets:
            self._on_ready(url_of(sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: hurry. Neither is raised again at the end: the exit code tells."""
        if self._loop is None:
            self.should_exit = True  # still starting
        else:
            self._loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        """Start to drain, or hurry if it has begun. Call on the event loop."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_in_stages())
        else:
            self._hurry.set()

    async def _drain_in_stages(self) -> None:
        switchboard = self._gateway.switchboard
        switchboard.begin_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while switchboard.calls_open and not self._hurry.is_set():
                    await asyncio.sleep(DRAIN_POLL_S)
        if switchboard.calls_open:
            self.exit_code = EXIT_ABORTED
            switchboard.fail_all(
                Draining(
                    "The server shut down before the request was done.",
                    hint="Send it again.",
                    retry_after_s=self._settings.drain_timeout_s,
                )
            )
            await self._flush()
        self.should_exit = True

    async def _flush(self) -> None:
        """Let the last events leave; a client that does not read them is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while self._gateway.switchboard.calls_open:
                    await asyncio.sleep(DRAIN_POLL_S)
