"""A gateway over a fake replica, on a real port, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai
from fake_link import FakeLink
from fakes import ByteTokenizer, PlainTemplate
from fastapi import FastAPI

from penstock.core.metrics import RequestOutcome
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.gateway.app import create_app
from penstock.gateway.server import GatewayServer, bind
from penstock.gateway.switchboard import Recorder, Switchboard

WAIT_S = 20.0  # how long a test waits for something that must happen; never a bound on speed


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll for a condition that must come true."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.005)


def make_settings(
    gateway: dict[str, Any] | None = None, desk: dict[str, Any] | None = None, **changes: Any
) -> Settings:
    base = Settings()
    return replace(
        base,
        gateway=replace(base.gateway, **{"port": 0, **(gateway or {})}),
        desk=replace(base.desk, **(desk or {})),
        **changes,
    )


@dataclass
class Running:
    """A served app: its link, its address, and what it has counted."""

    app: FastAPI
    link: FakeLink
    server: GatewayServer
    port: int
    outcomes: list[tuple[RequestOutcome, Request]]
    thread: threading.Thread
    clients: ExitStack = field(default_factory=ExitStack)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def switchboard(self) -> Switchboard:
        switchboard = self.app.state.gateway.switchboard
        assert isinstance(switchboard, Switchboard)
        return switchboard

    def http(self, **options: Any) -> httpx.Client:
        return self.clients.enter_context(
            httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False, **options)
        )

    def openai(self, **options: Any) -> openai.OpenAI:
        http = self.clients.enter_context(httpx.Client(trust_env=False))
        defaults: dict[str, Any] = {"api_key": "none", "max_retries": 0}
        return openai.OpenAI(base_url=f"{self.url}/v1", http_client=http, **{**defaults, **options})

    def begin_drain(self) -> None:
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(self.server.begin_drain)

    def wait_idle(self) -> None:
        """Every call answered, every request settled, the engine empty: nothing was lost or left running."""
        self.wait_idle_calls()
        wait_until(lambda: self.link.running_count == 0, "engine empty")

    def wait_idle_calls(self) -> None:
        """As `wait_idle`, for an engine that died and cannot become empty."""
        wait_until(lambda: self.switchboard.calls_open == 0, "calls closed")
        wait_until(lambda: self.switchboard.requests_open == 0, "requests settled")

    def stop(self) -> None:
        self.clients.close()
        self.server.should_exit = True
        self.thread.join(WAIT_S)
        self.link.close(WAIT_S)
        assert not self.thread.is_alive(), "the server stops"


def start(
    settings: Settings | None = None,
    link: FakeLink | None = None,
    send_bytes: int | None = None,
    recorder: Recorder | None = None,
) -> Running:
    """Serve from a thread. `send_bytes` makes the kernel's send buffers small, so that they fill soon."""
    link = link or FakeLink()
    settings = settings or make_settings()
    outcomes: list[tuple[RequestOutcome, Request]] = []
    app = create_app(
        link,
        ByteTokenizer(),
        PlainTemplate(),
        settings,
        on_outcome=lambda outcome, request: outcomes.append((outcome, request)),
        recorder=recorder,
    )
    urls: list[str] = []
    server = GatewayServer(app, settings.gateway, on_ready=urls.append)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    if send_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)  # connections inherit it
    thread = threading.Thread(target=server.run, args=([sock],), name="gateway", daemon=True)
    thread.start()
    wait_until(lambda: bool(urls), "the server listens")
    return Running(app, link, server, port, outcomes, thread)
