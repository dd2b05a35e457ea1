"""Fixtures of the HTTP tests: gateways of a test's own, and one that a module shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_link import FakeLink
from served import Running, start

from penstock.core.settings import Settings
from penstock.gateway.switchboard import Recorder


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start gateways with settings and links of the test's own; stopped afterwards."""
    started: list[Running] = []

    def serve_one(
        settings: Settings | None = None,
        link: FakeLink | None = None,
        send_bytes: int | None = None,
        recorder: Recorder | None = None,
    ) -> Running:
        started.append(start(settings, link, send_bytes, recorder))
        return started[-1]

    yield serve_one
    for running in started:
        running.stop()


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    """One gateway with default settings for a whole module."""
    running = start()
    yield running
    running.stop()
