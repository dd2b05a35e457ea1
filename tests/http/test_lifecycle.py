"""Health that tells the truth, engine death, and the staged drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from fake_link import FakeLink, make_info
from served import WAIT_S, Running, make_settings, wait_until

from penstock.core.errors import EnvironmentMissing, InvalidRequest
from penstock.gateway.server import bind
from penstock.gateway.text import inline_bytes_of

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50, "temperature": 0}


def test_a_frozen_engine_is_not_a_busy_one(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"stall_s": 0.4}), FakeLink(step_s=0.01))
    client = running.http()
    stream = running.openai().chat.completions.create(
        model="fake", messages=BODY["messages"], max_tokens=100, stream=True
    )
    for number, _ in enumerate(stream):  # a second of work, several times the stall limit
        if number % 10 == 0:
            assert client.get("/health").status_code == 200, "busy is healthy"
    assert client.get("/health").json() == {"status": "ok"}, "idle is healthy"
    running.link.freeze()
    wait_until(lambda: client.get("/health").status_code == 503, "a frozen engine shows")
    frozen = client.get("/health")
    assert frozen.json()["error"]["code"] == "no_healthy_engine" and frozen.headers["retry-after"]
    assert client.get("/ready").status_code == 503
    assert client.post(CHAT, json=BODY).status_code == 503, "nothing new is taken in"
    assert "penstock:engine_healthy{" in client.get("/metrics").text
    running.link.thaw()
    wait_until(lambda: client.get("/health").status_code == 200, "it recovers")
    assert client.post(CHAT, json=BODY).status_code == 200


def test_a_full_queue_is_neither_dead_nor_unready(serve: Callable[..., Running]) -> None:
    link = FakeLink(step_s=0.01, info=make_info(running_max=1))
    running = serve(make_settings(desk={"queue_requests_max": 0, "engine_ahead": 0}), link)
    stream = running.openai().chat.completions.create(
        model="fake", messages=BODY["messages"], max_tokens=50, stream=True
    )
    next(iter(stream))
    client = running.http()
    assert client.post(CHAT, json=BODY).json()["error"]["code"] == "overloaded"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert client.get("/load").json()["server_load"] == 1
    stream.close()
    running.wait_idle()


def test_when_the_engine_dies_everybody_is_told(serve: Callable[..., Running]) -> None:
    """Streaming, waiting for a whole answer, queued, new: each gets `no_healthy_engine`."""
    link = FakeLink(step_s=0.01, info=make_info(running_max=2))
    running = serve(make_settings(desk={"engine_ahead": 0}), link)
    stream = iter(
        running.openai().chat.completions.create(
            model="fake", messages=BODY["messages"], max_tokens=2000, stream=True
        )
    )
    next(stream)

    async def wait_for_death() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=running.url, timeout=WAIT_S, trust_env=False) as client:
            long = {**BODY, "max_tokens": 2000}
            tasks = [asyncio.create_task(client.post(CHAT, json=long)) for _ in range(3)]
            await asyncio.to_thread(wait_until, lambda: running.switchboard.requests_open == 4, "all are in")
            link.die()
            return list(await asyncio.gather(*tasks))

    answers = asyncio.run(wait_for_death())
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.json()["error"]["code"] for answer in answers} == {"no_healthy_engine"}
    assert all(answer.headers["retry-after"] for answer in answers)
    with pytest.raises(openai.APIError, match="engine died"):
        for _ in stream:
            pass
    client = running.http()
    assert client.get("/health").status_code == client.get("/ready").status_code == 503
    assert client.post(CHAT, json=BODY).json()["error"]["code"] == "no_healthy_engine"
    running.wait_idle_calls()


def test_a_drain_finishes_streams_and_refuses_the_rest(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(step_s=0.02))
    client = running.http()
    stream = iter(
        running.openai().chat.completions.create(
            model="fake", messages=BODY["messages"], max_tokens=60, stream=True, temperature=0
        )
    )
    pieces = [next(stream)]
    running.begin_drain()
    wait_until(lambda: running.switchboard.is_draining, "the drain began")
    refused = client.post(CHAT, json=BODY)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
    assert int(refused.headers["retry-after"]) >= 1
    assert client.get("/ready").status_code == 503, "not ready"
    assert client.get("/health").status_code == 200, "but alive"
    pieces += list(stream)
    assert len("".join(piece.choices[0].delta.content or "" for piece in pieces)) == 60
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive() and running.server.exit_code == 0


def test_what_outlives_the_drain_gets_an_error_event(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"drain_timeout_s": 0.2}), FakeLink(step_s=0.02))
    stream = iter(
        running.openai().chat.completions.create(
            model="fake", messages=BODY["messages"], max_tokens=3000, stream=True
        )
    )
    next(stream)
    running.begin_drain()
    with pytest.raises(openai.APIError, match="shut down"):
        for _ in stream:
            pass
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive() and running.server.exit_code == 1


SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from penstock.gateway.app import create_app
from penstock.gateway.server import run_gateway
from served import make_settings
from fake_link import FakeLink
from fakes import ByteTokenizer, PlainTemplate
settings = make_settings(gateway={"drain_timeout_s": 600.0})
link = FakeLink(step_s=0.02)
app = create_app(link, ByteTokenizer(), PlainTemplate(), settings)
sys.exit(run_gateway(app, settings, on_ready=lambda url: print(url, flush=True)))
"""


@pytest.mark.parametrize(("signals", "tokens", "code"), [(1, 60, 0), (2, 3000, 1)])
def test_sigterm_drains_and_a_second_one_does_not_wait(signals: int, tokens: int, code: int) -> None:
    here = Path(__file__).resolve().parent
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(here)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert not url.endswith(":0"), "the real port is told"
            with (
                httpx.Client(timeout=WAIT_S, trust_env=False) as client,
                client.stream(
                    "POST", url + CHAT, json={**BODY, "max_tokens": tokens, "stream": True}
                ) as answer,
            ):
                lines = (line for line in answer.iter_lines() if line)
                next(lines)
                os.kill(process.pid, signal.SIGTERM)
                wait_until(lambda: is_unready(url), "readiness is gone")
                if signals == 2:
                    os.kill(process.pid, signal.SIGTERM)
                rest = list(lines)
            if code == 0:
                assert rest[-1] == "data: [DONE]"
            else:
                assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "draining"
            assert process.wait(WAIT_S) == code
        finally:
            process.kill()


def is_unready(url: str) -> bool:
    return httpx.get(url + "/ready", timeout=WAIT_S, trust_env=False).status_code == 503


def test_a_taken_port_is_told(gateway: Running) -> None:
    with pytest.raises(EnvironmentMissing, match=str(gateway.port)):
        bind("127.0.0.1", gateway.port)
    with pytest.raises(EnvironmentMissing, match="nowhere.invalid"):
        bind("nowhere.invalid", 0)


class LoopingTemplate:
    """Takes a tenth of a second of CPU and gives up, as one that its limits stop."""

    def render(self, messages: object, /, *, add_generation_prompt: bool = True) -> str:
        until_s = time.thread_time() + 0.1
        while time.thread_time() < until_s:
            pass
        raise InvalidRequest("The chat template was stopped.", param="messages")


def test_a_template_that_loops_does_not_hold_the_others_up(serve: Callable[..., Running]) -> None:
    """It is found out at the start and kept off the event loop; legacy completions are served meanwhile."""
    running = serve()
    gateway = running.app.state.gateway
    gateway.template = LoopingTemplate()
    gateway.chat_inline_bytes = inline_bytes_of(gateway.template)
    threads: list[str] = []
    gateway.template.render = record_thread(gateway.template.render, threads)
    client = running.http()
    assert client.post(CHAT, json=BODY).status_code == 400
    assert client.post("/tokenize", json={"messages": BODY["messages"]}).status_code == 400
    assert len(threads) == 2 and all(name.startswith("penstock-text") for name in threads)
    assert client.post("/v1/completions", json={"model": "fake", "prompt": "x"}).status_code == 200


def record_thread(render: Callable[..., str], threads: list[str]) -> Callable[..., str]:
    def recorded(*args: object, **options: object) -> str:
        threads.append(threading.current_thread().name)
        return render(*args, **options)

    return recorded
