"""Clients that leave, that never read, that come two thousand at once; nothing is lost and nothing leaks."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_link import FakeLink, make_info
from served import WAIT_S, Running, make_settings, wait_until

from penstock.core.reasons import CancelReason, FinishReason

CHAT = "/v1/chat/completions"


def body_of(**changes: Any) -> dict[str, Any]:
    base = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2000}
    return {**base, "temperature": 0, **changes}


def raw_post(running: Running, body: dict[str, Any], receive_bytes: int | None = None) -> socket.socket:
    """Send a request and leave the answer unread."""
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(WAIT_S)
    sock.connect(("127.0.0.1", running.port))
    payload = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
    sock.sendall(head + payload)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_request_runs(serve: Callable[..., Running], stream: bool) -> None:
    running = serve(link=FakeLink(step_s=0.01))
    sock = raw_post(running, body_of(stream=stream, n=3))
    wait_until(lambda: running.link.running_count == 3, "it runs")
    sock.close()
    running.wait_idle()
    assert [reason for _, reason in running.link.cancels] == [CancelReason.CLIENT_DISCONNECT] * 3
    assert {outcome.finish for outcome, _ in running.outcomes} == {FinishReason.CANCELLED}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_request_waits(serve: Callable[..., Running], stream: bool) -> None:
    link = FakeLink(step_s=0.01, info=make_info(running_max=1))
    running = serve(make_settings(desk={"engine_ahead": 0}), link)
    first = raw_post(running, body_of())
    wait_until(lambda: link.running_count == 1, "the first runs")
    second = raw_post(running, body_of(stream=stream))
    wait_until(lambda: running.switchboard.requests_open == 2, "the second waits")
    second.close()
    wait_until(lambda: running.switchboard.requests_open == 1, "the second is gone")
    assert len(link.submitted) == 1, "it never reached the engine"
    first.close()
    running.wait_idle()


def test_a_client_that_never_reads_is_cut_and_nobody_else_waits(serve: Callable[..., Running]) -> None:
    """Its buffers fill; its request is cancelled once too much waits for it. Others are served."""
    settings = make_settings(gateway={"stream_buffer_tokens_max": 16, "write_stall_s": 0.5})
    running = serve(settings, FakeLink(step_s=0.0005), send_bytes=4096)
    wide = {"logprobs": True, "top_logprobs": 20, "stream": True, "max_tokens": 4000}
    sock = raw_post(running, body_of(**wide), receive_bytes=4096)
    others = running.http().post(CHAT, json=body_of(max_tokens=5))
    assert others.status_code == 200
    wait_until(
        lambda: bool(running.link.cancels) and running.link.cancels[0][1] is CancelReason.SLOW_CLIENT,
        "it is cancelled",
    )
    running.wait_idle()
    wait_until(lambda: not running.server.server_state.tasks, "its connection is closed")
    sock.close()


def test_a_whole_answer_that_nobody_reads_does_not_hold_its_connection(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"write_stall_s": 0.2}), FakeLink(step_s=0.0), send_bytes=4096)
    running.server.config.timeout_keep_alive = 1
    wide = {"logprobs": True, "top_logprobs": 20, "n": 4, "max_tokens": 1500}
    sock = raw_post(running, body_of(**wide), receive_bytes=4096)
    wait_until(lambda: len(running.outcomes) == 4, "it is answered")
    wait_until(lambda: not running.server.server_state.connections, "its connection is closed")
    sock.close()


def test_a_deadline_ends_the_work(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(step_s=0.01))
    headers = {"x-penstock-deadline-ms": "100"}
    answer = running.http().post(CHAT, json=body_of(), headers=headers)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    running.wait_idle()
    assert running.link.cancels[0][1] is CancelReason.DEADLINE


async def post_raw(port: int, body: dict[str, Any]) -> tuple[int, bytes]:
    """One connection, one request, everything that comes back; cheap enough for thousands at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n\r\n"
    writer.write(head.encode() + payload)
    raw = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(raw[9:12]), raw


async def flood(running: Running, count: int) -> list[int]:
    async def one(number: int) -> int:
        status, raw = await post_raw(running.port, body_of(max_tokens=2, stream=number % 2 == 0))
        if status == 503:
            assert b'"overloaded"' in raw and b"retry-after: " in raw
        elif number % 2 == 0:
            assert raw.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        return status

    return list(await asyncio.gather(*(one(number) for number in range(count))))


def thaw_when_full(running: Running) -> None:
    wait_until(lambda: running.switchboard.requests_open == 1024 + 72, "desk and engine are full")
    running.link.thaw()


def test_two_thousand_connections_at_once(serve: Callable[..., Running]) -> None:
    """Each is answered: served, or refused with 503; the engine never holds more than its window."""
    link = FakeLink(step_s=0.002, info=make_info(running_max=64))
    running = serve(make_settings(desk={"queue_requests_max": 1024, "engine_ahead": 8}), link)
    link.freeze()  # so that they really are there at once
    thawing = threading.Thread(target=thaw_when_full, args=(running,))
    thawing.start()
    statuses = asyncio.run(flood(running, 2000))
    thawing.join()
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 1024 + 72
    assert link.running_most <= 72
    running.wait_idle()
    finishes = [outcome.finish for outcome, _ in running.outcomes]
    assert finishes.count(FinishReason.LENGTH) == statuses.count(200)
    assert running.http().post(CHAT, json=body_of(max_tokens=1)).status_code == 200


def test_random_leavers_lose_nothing(serve: Callable[..., Running]) -> None:
    """Waves of streams, a third of which leave at different moments; every text that ends is whole."""
    link = FakeLink(step_s=0.001, info=make_info(running_max=16))
    running = serve(link=link)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = body_of(max_tokens=30, stream=True, messages=[{"role": "user", "content": str(number)}])
        try:
            async with asyncio.timeout(0.01 * (number % 7) if number % 3 == 0 else WAIT_S * 6):
                answer = await client.post(running.url + CHAT, json=body)
                assert answer.text.endswith("data: [DONE]\n\n")
                assert len("".join(re.findall('"content":"([^"]*)"', answer.text))) == 30
        except TimeoutError:
            assert number % 3 == 0, "only a leaver may time out"

    async def waves() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:
            await asyncio.gather(*(one(client, number) for number in range(150)))

    asyncio.run(waves())
    running.wait_idle()
    assert len({outcome.request_id for outcome, _ in running.outcomes}) == len(running.outcomes)
    assert all(
        outcome.finish in (FinishReason.LENGTH, FinishReason.CANCELLED) for outcome, _ in running.outcomes
    )
