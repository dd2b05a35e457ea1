"""The issue's list of bad input, sent to the real server; after each, a good request is served."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from benchmarks.server_process import ServerProcess, metric_sum, wait_until
from live import BODY, CHAT, COMPLETIONS, StartServer, is_idle
from tiny_chat_model import CONTEXT_LEN, VOCAB

GOOD: dict[str, Any] = {**BODY, "max_tokens": 2}
GOOD_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
KV_TOKENS_TOO_MANY = 6000  # within the context, beyond the pool
CONNECTIONS = 2000
FILES_SPARE = 200

TOO_LONG, TOO_LARGE = "context_length_exceeded", "request_exceeds_capacity"
UNSUPPORTED = "unsupported_parameter"

# (path, changed fields, status, param, code)
FIELDS: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    (COMPLETIONS, {"model": "gpt-9"}, 404, "model", "model_not_found"),
    (COMPLETIONS, {"max_tokens": 0}, 400, "max_tokens", None),
    (COMPLETIONS, {"max_tokens": -1}, 400, "max_tokens", None),
    (COMPLETIONS, {"max_tokens": "9"}, 400, "max_tokens", None),
    (COMPLETIONS, {"temperature": []}, 400, "temperature", None),
    (COMPLETIONS, {"n": 1000}, 400, "n", None),
    (COMPLETIONS, {"stop": ["x"] * 100_000}, 400, "stop", None),
    (COMPLETIONS, {"prompt": [VOCAB]}, 400, "prompt", None),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", None),
    (COMPLETIONS, {"prompt": [1 << 70]}, 400, "prompt", None),
    (COMPLETIONS, {"prompt": [5] * CONTEXT_LEN}, 400, "prompt", TOO_LONG),
    (COMPLETIONS, {"prompt": "word " * 200_000}, 400, "prompt", TOO_LONG),
    (COMPLETIONS, {"max_tokens": CONTEXT_LEN}, 400, "max_tokens", TOO_LONG),
    (COMPLETIONS, {"prompt": [5] * KV_TOKENS_TOO_MANY}, 400, "prompt", TOO_LARGE),
    (COMPLETIONS, {"max_tokens": KV_TOKENS_TOO_MANY}, 400, "max_tokens", TOO_LARGE),
    (COMPLETIONS, {"logit_bias": {str(VOCAB): 1}}, 400, "logit_bias", None),
    (CHAT, {"messages": "hi"}, 400, "messages", None),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 2_000_000}]}, 400, "messages", TOO_LONG),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", UNSUPPORTED),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", UNSUPPORTED),
    (CHAT, {"top_logprobs": 3}, 400, "top_logprobs", None),
]  # fmt: skip

# (body, status)
BODIES = [
    pytest.param(b"", 400, id="empty"),
    pytest.param(b"{", 400, id="cut"),
    pytest.param(b"\xff\xfe{}", 400, id="not UTF-8"),
    pytest.param(b'{"model": "tiny", "prompt": NaN}', 400, id="NaN"),
    pytest.param(b'{"model": "tiny", "prompt": "\\ud800"}', 400, id="lone surrogate"),
    pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, id="deep"),
    pytest.param(b'{"model": "tiny", "prompt": "' + b"x" * (9 << 20) + b'"}', 413, id="huge"),
]


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client; and whatever the test sent, the next good request is served."""
    with server.client() as client:
        yield client
        answer = client.post(COMPLETIONS, json=GOOD)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
        assert client.get("/health").status_code == 200


def assert_error(answer: httpx.Response, status: int, param: str | None, code: str | None) -> None:
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (error["param"], error["code"]) == (param, code), error
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "code"),
    FIELDS,
    ids=[json.dumps(change)[:40] for _, change, *_ in FIELDS],
)
def test_a_bad_field(
    http: httpx.Client, path: str, change: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    good = GOOD_CHAT if path == CHAT else GOOD
    assert_error(http.post(path, json={**good, **change}), status, param, code)


@pytest.mark.parametrize(("body", "status"), BODIES)
def test_a_bad_body(http: httpx.Client, body: bytes, status: int) -> None:
    answer = http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


def test_nul_characters_are_text(http: httpx.Client) -> None:
    for text in ("\x00", "a\x00b", "\x00" * 100):
        assert http.post(COMPLETIONS, json={**GOOD, "prompt": text, "stop": "\x00"}).status_code == 200
        message = {"role": "user", "content": text}
        assert http.post(CHAT, json={**GOOD_CHAT, "messages": [message]}).status_code == 200


def test_what_just_fits_is_served(http: httpx.Client, server: ServerProcess) -> None:
    """The last request that the door lets in is one that the engine can finish."""
    kv_tokens = server.info["kv_blocks"] * server.info["kv_block_tokens"]
    prompt = [5 + index % 200 for index in range(kv_tokens)]
    fits = http.post(COMPLETIONS, json={**GOOD, "prompt": prompt, "max_tokens": 1})
    assert fits.status_code == 200 and fits.json()["usage"]["total_tokens"] == kv_tokens + 1
    over = http.post(COMPLETIONS, json={**GOOD, "prompt": prompt, "max_tokens": 2})
    assert_error(over, 400, "max_tokens", "request_exceeds_capacity")


def test_a_client_that_never_reads(serve: StartServer) -> None:
    """Its answer fills every buffer between the two; then its work and its connection are ended."""
    server = serve(settings={"gateway.write_stall_s": 0.3, "gateway.stream_buffer_tokens_max": 16})
    url = httpx.URL(server.url)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((url.host, url.port))
        # The scores of the echoed prompts are ten megabytes: more than a kernel holds for a connection.
        wide = {**GOOD, "prompt": [5] * 2500, "echo": True, "logprobs": 20, "n": 8, "max_tokens": 50}
        payload = json.dumps({**wide, "stream": True}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
        sock.sendall(head.encode() + payload)
        wait_until(lambda: "slow_client" in str(server.metrics()), "it is cancelled")
        wait_until(lambda: is_idle(server), "slot and KV are free")
        with server.client() as client:
            assert client.post(COMPLETIONS, json=GOOD).status_code == 200
    assert server.stop() == 0


def test_a_client_that_sends_slowly(serve: StartServer) -> None:
    """Half a body, half a header: each is ended when its time is up, and holds nobody else."""
    server = serve(settings={"gateway.body_timeout_s": 0.3, "gateway.header_timeout_s": 0.3})
    url = httpx.URL(server.url)
    with (
        socket.create_connection((url.host, url.port or 80), timeout=60.0) as half_body,
        socket.create_connection((url.host, url.port or 80), timeout=60.0) as half_head,
    ):
        half_body.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode())
        half_head.sendall(b"POST /v1/compl")
        with server.client() as client:
            assert client.post(COMPLETIONS, json=GOOD).status_code == 200
        assert half_body.recv(4096).startswith(b"HTTP/1.1 408")
        assert half_head.recv(4096) == b""
    assert server.stop() == 0


async def post_raw(server: ServerProcess, gate: asyncio.Event, number: int) -> tuple[int, bytes]:
    """Connect, wait for everybody else to have connected, then ask; (status, everything received)."""
    url = httpx.URL(server.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    await gate.wait()
    payload = json.dumps({**GOOD, "stream": number % 2 == 0, "seed": number}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer[9:12]), answer


async def flood(server: ServerProcess) -> list[tuple[int, bytes]]:
    gate = asyncio.Event()
    tasks = [asyncio.create_task(post_raw(server, gate, number)) for number in range(CONNECTIONS)]
    while len(server.gateway.net_connections("tcp")) < CONNECTIONS:
        await asyncio.sleep(0.05)
    gate.set()
    return await asyncio.gather(*tasks)


def test_two_thousand_connections_at_once(server: ServerProcess) -> None:
    """All are open together; each is answered whole, or refused with 503 and a time to come back."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < CONNECTIONS + FILES_SPARE:
        pytest.skip(f"this shell allows {soft} open files; the test needs {CONNECTIONS + FILES_SPARE}")
    answers = asyncio.run(flood(server))
    served = [answer for status, answer in answers if status == 200]
    refused = [answer for status, answer in answers if status == 503]
    assert len(served) + len(refused) == CONNECTIONS
    assert len(served) >= 1024, "as many as may wait are served"
    assert all(b'"overloaded"' in answer and b"retry-after: " in answer for answer in refused)
    whole = sum(b'"finish_reason":"length"' in answer for answer in served)
    assert whole == len(served), "no stream was cut"
    wait_until(lambda: is_idle(server), "nothing is left")
    assert metric_sum(server.metrics(), "penstock:calls_open") == 0
    deadline_s = time.monotonic() + 60.0
    while len(server.gateway.net_connections("tcp")) > 50:
        assert time.monotonic() < deadline_s, "its connections are closed"
        time.sleep(0.05)
    with server.client() as client:
        assert client.post(COMPLETIONS, json=GOOD).status_code == 200
