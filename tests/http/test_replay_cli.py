"""`penstock replay` and `penstock trace` as commands: output, files, exit codes, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from fake_openai import FakeServer, running
from typer.testing import CliRunner, Result

from penstock.cli import replay, trace
from penstock.core.errors import ConfigError, EnvironmentMissing, TraceError


@contextmanager
def served(server: FakeServer) -> Iterator[FakeServer]:
    """The fake server in a thread of its own, since the command owns this thread's event loop."""
    ready, done = threading.Event(), threading.Event()

    async def main() -> None:
        async with running(server):
            ready.set()
            while not done.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        done.set()
        thread.join()


def invoke(*args: str) -> Result:
    return CliRunner().invoke(_app(), list(args), env={"OPENAI_API_KEY": ""})


QUICK = ("--window", "7500:10000", "--time-scale", "5000", "--max-output-tokens", "4", "--quiet")


def test_replay_writes_a_report_and_succeeds(tmp_path: Path) -> None:
    with served(FakeServer()) as server:
        result = invoke(
            "replay", "sample:burstgpt1", "--url", server.url + "/v1", *QUICK, "--out", str(tmp_path),
            "--fail-on-loss", "--api-key", "secret-key",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "TTFT" in result.output and "lengths were clamped" in result.output
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer secret-key"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["requests"]["answered"] == len(server.seen) > 10
    assert report["configuration"]["model"] == "fake"
    assert "secret-key" not in (tmp_path / "report.json").read_text() + (tmp_path / "report.html").read_text()


def test_loss_fails_only_when_asked() -> None:
    with served(FakeServer(refuse=lambda number: 503 if number == 1 else None)) as server:
        args = ("replay", "sample:burstgpt1", "--url", server.url, *QUICK, "--json")
        lenient = invoke(*args)
        server.seen.clear()
        strict = invoke(*args, "--fail-on-loss")
    assert (lenient.exit_code, strict.exit_code) == (0, 1)
    assert json.loads(lenient.output)["requests"]["errors"] == {"overloaded": 1}


def test_ctrl_c_ends_with_a_partial_report() -> None:
    with served(FakeServer(gap_s=0.05)) as server:

        def interrupt() -> None:
            while len(server.ended_at_s) < 1:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        result = invoke(
            "replay", "sample:burstgpt1", "--url", server.url, "--json", "--quiet", "--time-scale", "10",
            "--max-output-tokens", "3",
        )  # fmt: skip
    report = json.loads(result.output)
    assert report["interrupted"] is True
    assert report["requests"]["answered"] >= 1 and report["requests"]["lost"] == 0


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("replay", "sample:burstgpt1", "--url", "http://127.0.0.1:9"), EnvironmentMissing),
        (("replay", "sample:burstgpt1", "--url", "localhost"), ConfigError),
        (("replay", "sample:burstgpt1", "--endpoint", "embeddings"), ConfigError),
        (("replay", "sample:burstgpt1", "--window", "x"), ConfigError),
        (("replay", "/nonexistent/trace.csv"), TraceError),
        (("trace", "describe", "sample:none"), TraceError),
        (("trace", "convert", "sample:burstgpt1", "/nonexistent/out.jsonl"), EnvironmentMissing),
        (("trace", "convert", "sample:burstgpt1", "out.jsonl", "--to", "parquet"), ConfigError),
    ],
)
def test_mistakes_are_errors_with_a_hint(args: tuple[str, ...], error: type[Exception]) -> None:
    result = invoke(*args)
    assert isinstance(result.exception, error)
    assert "hint: " in str(result.exception)


def test_describe_on_the_terminal_and_as_json() -> None:
    text = invoke("trace", "describe", "sample:burstgpt3")
    assert text.exit_code == 0 and "135, 2.9 turns" in text.output and "ChatGPT" in text.output
    found = json.loads(invoke("trace", "describe", "sample:burstgpt1", "--json").output)
    assert (found["format"], found["rows"], found["failed"]) == ("burstgpt", 400, 17)


def test_convert_then_describe(tmp_path: Path) -> None:
    out = tmp_path / "log.jsonl.gz"
    result = invoke(
        "trace",
        "convert",
        "sample:burstgpt3",
        str(out),
        "--window",
        "0:1h",
        "--length-divisor",
        "4",
        "--json",
    )
    assert json.loads(result.output)["rows"] == 26
    found = json.loads(invoke("trace", "describe", str(out), "--json").output)
    assert (found["format"], found["rows"], found["sessions"]["sessions"]) == ("jsonl", 26, 15)


def test_help_names_every_option_and_ends_with_examples() -> None:
    result = CliRunner().invoke(
        _app(), ["replay", "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    )
    for flag in (
        "--url --model --api-key --endpoint --rate-scale --time-scale --window --limit --warmup-s "
        "--length-divisor --max-prompt-tokens --max-output-tokens --seed --slo-ttft-ms --slo-tpot-ms "
        "--slo-e2e-ms --closed-loop --concurrency-max --timeout-s --out --json --quiet --fail-on-loss"
    ).split():
        assert flag in result.output
    assert "Examples:" in result.output


def _app() -> typer.Typer:
    app = typer.Typer()
    trace.register(app)
    replay.register(app)
    return app
