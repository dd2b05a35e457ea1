"""Tokens come as they are made, and work that nobody waits for stops: slot and KV are free again."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import httpx
import pytest
from benchmarks.server_process import ServerProcess, metric_sum, wait_until
from live import BODY, COMPLETIONS, is_idle

LONG = {**BODY, "max_tokens": 4000}
RUNNING_MAX, AHEAD = 4, 8  # of the shared server: slots, and how many more the engine is handed


def post_and_leave_unread(server: ServerProcess, **changes: object) -> socket.socket:
    url = httpx.URL(server.url)
    sock = socket.create_connection((url.host, url.port or 80), timeout=60.0)
    payload = json.dumps({**LONG, **changes}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    sock.sendall(head.encode() + payload)
    return sock


def cancelled(server: ServerProcess) -> float:
    """Requests that ended as cancelled so far."""
    samples = server.metrics().items()
    return sum(
        value
        for name, value in samples
        if name.startswith("penstock:request_success_total") and 'finished_reason="cancelled"' in name
    )


def assert_serves(server: ServerProcess) -> None:
    with server.client() as client:
        answer = client.post(COMPLETIONS, json={**LONG, "max_tokens": 3})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3


def test_curl_shows_tokens_as_they_come(server: ServerProcess) -> None:
    """Many reads with whole tokens in them, the first while the request still runs; in order."""
    body = json.dumps({**LONG, "max_tokens": 2000, "stream": True})
    command = ["curl", "-N", "-s", server.url + COMPLETIONS, "-d", body]
    with subprocess.Popen(
        [*command, "-H", "content-type: application/json", "--noproxy", "*"], stdout=subprocess.PIPE
    ) as curl:
        assert curl.stdout is not None
        reads = [os.read(curl.stdout.fileno(), 1 << 16)]
        assert reads[0].startswith(b"data: {") and b"[DONE]" not in reads[0]
        assert server.load()["requests_running"] == 1, "it shows tokens before it has them all"
        while data := os.read(curl.stdout.fileno(), 1 << 16):
            reads.append(data)
    assert curl.returncode == 0 and len(reads) >= 20
    events = b"".join(reads).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2])
    with server.client() as client:
        whole = client.post(COMPLETIONS, json={**LONG, "max_tokens": 2000}).json()
    assert text == whole["choices"][0]["text"]


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_it_runs_frees_slot_and_kv(server: ServerProcess, stream: bool) -> None:
    before = cancelled(server)
    sock = post_and_leave_unread(server, stream=stream, n=2)
    wait_until(lambda: server.load()["requests_running"] == 2, "it runs")
    assert server.load()["kv_usage_frac"] > 0
    sock.close()
    wait_until(lambda: is_idle(server), "slot and KV are free")
    assert cancelled(server) == before + 2
    assert_serves(server)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_it_waits_frees_its_place(server: ServerProcess, stream: bool) -> None:
    """Four run; the fifth waits inside the engine, and the last at the desk. Both leave, the four go on."""
    running = [post_and_leave_unread(server, stream=True, seed=seed) for seed in range(RUNNING_MAX)]
    wait_until(lambda: server.load()["requests_running"] == RUNNING_MAX, "all slots are taken")
    before = cancelled(server)
    waiting = [post_and_leave_unread(server, stream=stream) for _ in range(AHEAD + 2)]
    wait_until(lambda: server.load()["requests_waiting"] == AHEAD + 2, "they wait")
    reasons = server.metrics()
    assert any(
        "waiting_requests{" in name and 'reason="desk"' in name and value for name, value in reasons.items()
    )
    for sock in (waiting[0], waiting[-1]):
        sock.close()
    wait_until(lambda: cancelled(server) == before + 2, "both are gone")
    assert server.load()["requests_waiting"] == AHEAD and server.load()["requests_running"] == RUNNING_MAX
    for sock in waiting[1:-1] + running:
        sock.close()
    wait_until(lambda: is_idle(server), "nothing is left")
    assert cancelled(server) == before + RUNNING_MAX + AHEAD + 2
    assert_serves(server)


def test_what_was_computed_stays_as_prefix(server: ServerProcess) -> None:
    """A cancelled request's KV is not thrown away: the same prompt is found again."""
    prompt = "Only this test asks about whales, and at some length, so that blocks fill. " * 4
    sock = post_and_leave_unread(server, prompt=prompt, stream=True)
    assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    sock.close()
    wait_until(lambda: is_idle(server), "it is cancelled")
    with server.client() as client:
        usage = client.post(COMPLETIONS, json={**LONG, "prompt": prompt, "max_tokens": 2}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 16


def test_a_deadline_ends_it(server: ServerProcess) -> None:
    with server.client() as client:
        late = client.post(COMPLETIONS, json=LONG, headers={"x-penstock-deadline-ms": "50"})
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
    wait_until(lambda: is_idle(server), "the work stopped")


def test_the_counters_add_up(server: ServerProcess) -> None:
    """Every request that the session has seen ended in exactly one way, and the engine's pool is whole."""
    wait_until(lambda: is_idle(server), "idle")
    samples = server.metrics()
    assert metric_sum(samples, "penstock:num_requests_running") == 0
    assert metric_sum(samples, "penstock:num_requests_waiting") == 0
    assert metric_sum(samples, "penstock:calls_open") == 0
    cached = metric_sum(samples, "penstock:kv_blocks_cached")
    assert 0 < cached <= server.info["kv_blocks"], "finished work is cached, not held"
