"""/health tells a stuck engine from a busy one, and a dead one from both."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import ExitStack

import httpx
import pytest
from benchmarks.server_process import ServerProcess, wait_until
from live import BODY, COMPLETIONS, StartServer, assert_engine_gone, error_code, is_idle, open_stream

STALL = {"gateway.stall_s": 1.5, "gateway.keepalive_s": 0.5}


def status(server: ServerProcess, path: str) -> int:
    with server.client() as client:
        return client.get(path).status_code


async def keep_busy(server: ServerProcess) -> tuple[list[int], list[int]]:
    """A dozen long prompts on four slots; the statuses of the answers, and of /health meanwhile."""
    health = []
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0, trust_env=False) as client:
        body = {**BODY, "max_tokens": 4}
        work = [
            asyncio.create_task(client.post(COMPLETIONS, json={**body, "prompt": [5 + number] * 3000}))
            for number in range(12)
        ]
        while not all(task.done() for task in work):
            health.append((await client.get("/health")).status_code)
            await asyncio.sleep(0.05)
        return [task.result().status_code for task in work], health


def test_busy_is_healthy_frozen_is_not_and_dead_is_told(serve: StartServer) -> None:
    """One server's life in three acts; the last one ends it."""
    server = serve(settings=STALL)
    answers, health = asyncio.run(keep_busy(server))
    assert set(answers) == {200}
    assert set(health) == {200} and len(health) >= 5, "busy is healthy"
    wait_until(lambda: is_idle(server), "idle")

    with ExitStack() as stack:
        lines = open_stream(server, stack, 3000)
        server.engine.suspend()
        wait_until(lambda: status(server, "/health") == 503, "a frozen engine shows")
        assert status(server, "/ready") == 503
        with server.client() as client:
            refused = client.post(COMPLETIONS, json={**BODY, "prompt": "x", "max_tokens": 1})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "no_healthy_engine"
            healthy = [line for line in client.get("/metrics").text.splitlines() if "engine_healthy{" in line]
            assert [line.rpartition(" ")[2] for line in healthy] == ["0.0"]
        server.engine.resume()
        wait_until(lambda: status(server, "/health") == 200, "it recovers")
        rest = list(lines)
        assert rest[-1] == "data: [DONE]", "the stream was only late"
        assert ": keep-alive" in rest, "and its connection was kept alive meanwhile"

    with ExitStack() as stack:
        streams = [open_stream(server, stack, 5000, seed) for seed in range(2)]
        server.engine.kill()
        for lines in streams:
            assert error_code(list(lines)[-1]) == "no_healthy_engine"
    with server.client() as client:
        for path in ("/health", "/ready"):
            answer = client.get(path)
            assert answer.status_code == 503 and answer.headers["retry-after"]
        refused = client.post(COMPLETIONS, json={**BODY, "prompt": "x", "max_tokens": 1})
        assert refused.json()["error"]["code"] == "no_healthy_engine"
    assert is_idle_of_calls(server)
    assert server.stop() == 0, "nobody was cut by the shutdown"


def is_idle_of_calls(server: ServerProcess) -> bool:
    return server.load()["server_load"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_everybody_in_flight_is_told_of_a_death(serve: StartServer, stream: bool) -> None:
    """Running, waiting in the engine and waiting at the desk; whole answers get a status of their own."""
    server = serve()

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120.0, trust_env=False) as client:
            body = {**BODY, "prompt": "x", "max_tokens": 5000, "stream": stream}
            work = [asyncio.create_task(client.post(COMPLETIONS, json=body)) for _ in range(20)]
            await asyncio.to_thread(
                wait_until, lambda: server.load()["requests_waiting"] == 16, "four run, the others wait"
            )
            server.engine.kill()
            return await asyncio.gather(*work)

    for answer in asyncio.run(ask()):
        if answer.status_code == 200:
            assert stream and error_code(answer.text.strip().split("\n\n")[-1]) == "no_healthy_engine"
        else:
            assert answer.status_code == 503
            assert json.loads(answer.text)["error"]["code"] == "no_healthy_engine"
    assert server.stop() == 0


def test_a_stuck_engine_does_not_hold_the_shutdown(serve: StartServer) -> None:
    server = serve("--drain-timeout-s", "0.5")
    with ExitStack() as stack:
        lines = open_stream(server, stack, 5000)
        server.engine.suspend()
        server.signal(signal.SIGTERM)
        assert error_code(list(lines)[-1]) == "draining"
    assert server.wait() == 1
    assert_engine_gone(server)
