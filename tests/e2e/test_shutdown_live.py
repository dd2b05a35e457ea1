"""SIGTERM in stages, Ctrl-C, and the death of either process: nothing hangs, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from benchmarks.server_process import PENSTOCK, STOP_TIMEOUT_S, ServerProcess, wait_until
from live import BODY, COMPLETIONS, StartServer, assert_engine_gone, error_code, open_stream


def refuses_as_draining(server: ServerProcess) -> bool:
    with server.client() as client:
        try:
            answer = client.post(COMPLETIONS, json={**BODY, "max_tokens": 1})
        except httpx.TransportError:
            return False
    return answer.status_code == 503 and answer.json()["error"]["code"] == "draining"


def test_sigterm_in_mid_stream_finishes_the_streams(serve: StartServer) -> None:
    server = serve()
    with ExitStack() as stack:
        streams = [open_stream(server, stack, 1500, seed) for seed in range(3)]
        server.signal(signal.SIGTERM)
        wait_until(lambda: refuses_as_draining(server), "new requests are refused")
        with server.client() as client:
            assert client.get("/health").status_code == 200, "draining is healthy"
            assert client.get("/ready").status_code == 503, "but not ready"
            assert client.get("/load").json()["requests_running"] == 3, "the streams go on"
        for lines in streams:
            rest = list(lines)
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0
    assert_engine_gone(server)
    assert "Traceback" not in server.log


def test_a_second_signal_does_not_wait(serve: StartServer) -> None:
    server = serve()
    with ExitStack() as stack:
        lines = open_stream(server, stack, 5000)
        server.signal(signal.SIGTERM)
        wait_until(lambda: refuses_as_draining(server), "it drains")
        server.signal(signal.SIGTERM)
        assert error_code(list(lines)[-1]) == "draining"
    assert server.wait() == 1, "streams were cut: not in order"
    assert_engine_gone(server)


def test_what_outlives_the_drain_is_told(serve: StartServer) -> None:
    server = serve("--drain-timeout-s", "0.2")
    with ExitStack() as stack:
        lines = open_stream(server, stack, 5000)
        server.signal(signal.SIGINT)
        assert error_code(list(lines)[-1]) == "draining"
    assert server.wait() == 1


def test_ctrl_c_reaches_both_processes_and_ends_both(serve: StartServer) -> None:
    """A terminal signals the whole group. The engine leaves it to the gateway, which is idle: exit 0."""
    server = serve()
    os.kill(server.engine.pid, signal.SIGINT)
    os.kill(server.engine.pid, signal.SIGTERM)
    with server.client() as client:
        assert client.post(COMPLETIONS, json={**BODY, "max_tokens": 2}).status_code == 200
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert_engine_gone(server)


def test_an_engine_does_not_outlive_a_killed_gateway(serve: StartServer) -> None:
    server = serve()
    with ExitStack() as stack:
        open_stream(server, stack, 5000)
        server.signal(signal.SIGKILL)
        assert_engine_gone(server)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (("calibrate", "--served"), signal.SIGTERM),
        (("fidelity", "sample:burstgpt1", "--limit", "15"), signal.SIGINT),
    ],
    ids=("calibrate", "fidelity"),
)
def test_a_command_that_is_stopped_stops_the_server_it_started(
    command: tuple[str, ...], number: signal.Signals, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments, log = (*command, "--model", str(tiny_folder), "--threads", "1"), tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*PENSTOCK, *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=errors
        )
    started: list[psutil.Process] = []
    try:
        wait_until(lambda: "clients" in log.read_text(), "its server serves")
        started += psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(STOP_TIMEOUT_S) == 130
        gone, alive = psutil.wait_procs(started, timeout=30.0)
        assert gone and not alive
    finally:
        for child in started:
            if child.is_running():
                child.kill()
        process.kill()
        process.wait()
