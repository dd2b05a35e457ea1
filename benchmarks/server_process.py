"""A `penstock serve` of one's own, as users start it: a process, a URL, and a signal at the end.

The benchmarks and the end-to-end tests share it. Everything it starts is ended by its own process id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import httpx
import psutil

from penstock.core.config import ENV_OTHER, ENV_PREFIX, environment_name

START_TIMEOUT_S = 120.0  # the model may have to be fetched first
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 120.0  # generous: a machine may be busy with other things
POLL_S = 0.02
ENGINE_MARK = "spawn_main"  # in the engine process's command line, and not in its resource tracker's

PENSTOCK = (sys.executable, "-m", "penstock.cli.main")


class ServerProcess:
    """A running server. `info` is its start-up summary (`penstock serve --json`)."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, info: dict[str, Any], log: Path) -> None:
        self.process = process
        self.url = url
        self.info = info
        self._log = log
        self.engine = _engine_of(process.pid)
        self.gateway = psutil.Process(process.pid)

    @property
    def log(self) -> str:
        """What it has written to stderr so far."""
        return self._log.read_text(errors="replace")

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False, **options)

    def metrics(self) -> dict[str, float]:
        """Samples of `/metrics`, by name and labels as they are written there."""
        with self.client() as client:
            return parse_metrics(client.get("/metrics").text)

    def load(self) -> dict[str, float]:
        with self.client() as client:
            return dict(client.get("/load").json())

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Exit code, once it has ended by itself. Raises `subprocess.TimeoutExpired`."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """SIGTERM, and the exit code; a server that does not end is killed, and that raises."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.wait()
        finally:
            self.kill()

    def kill(self) -> None:
        """End both processes now. Safe to call at any time."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        for _ in range(int(STOP_TIMEOUT_S / POLL_S)):
            if not _is_running(self.engine):
                return
            self.engine.kill()
            time.sleep(POLL_S)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def start_server(
    model: str | Path, folder: Path, *flags: str, settings: Mapping[str, object] | None = None
) -> ServerProcess:
    """Serve `model` on a free port of the loopback interface; returns when it takes requests.

    `settings` maps dotted keys to values, for what has no flag. `folder` gets the log and the ready file.
    Raises RuntimeError with the server's own words when it does not start.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    ready, log = place / "url", place / "stderr.txt"
    command = [*PENSTOCK, "serve", "--model", str(model), "--port", "0", "--ready-file", str(ready), "--json"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, *flags], env=environment(settings or {}), stdout=subprocess.PIPE, stderr=errors
        )
    try:
        _wait_ready(process, ready, log)
        assert process.stdout is not None
        info = _read_summary(process.stdout)
        return ServerProcess(process, ready.read_text().strip(), info, log)
    except BaseException:
        process.kill()
        process.wait()
        raise


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Ours, free of a developer's own settings, with these."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENV_PREFIX) or name in ENV_OTHER
    }
    return inherited | {environment_name(key): str(value) for key, value in settings.items()}


def parse_metrics(text: str) -> dict[str, float]:
    """The Prometheus text format, without its comments."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def metric_sum(samples: Mapping[str, float], name: str) -> float:
    """A metric summed over its labels. KeyError when there is no such metric."""
    found = [value for sample, value in samples.items() if sample.partition("{")[0] == name]
    if not found:
        raise KeyError(name)
    return sum(found)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
    """Poll for a condition that must come true; raises AssertionError saying what never happened."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(POLL_S)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def run_penstock(*arguments: str, settings: Mapping[str, object] | None = None) -> Ended:
    """Run a command that ends by itself."""
    done = subprocess.run(
        [*PENSTOCK, *arguments],
        env=environment(settings or {}),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def _wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not (ready.exists() and ready.read_text().strip()):
        code = process.poll()
        if code is not None or time.monotonic() > deadline_s:
            said = log.read_text(errors="replace")
            raise RuntimeError(f"the server did not start (exit code {code}):\n{said}")
        time.sleep(POLL_S)


def _read_summary(stdout: IO[bytes]) -> dict[str, Any]:
    """The first line; nothing else is ever written there, so the pipe cannot fill."""
    return dict(json.loads(stdout.readline()))


def _engine_of(pid: int) -> psutil.Process:
    children = psutil.Process(pid).children()
    engines = [child for child in children if any(ENGINE_MARK in word for word in child.cmdline())]
    assert len(engines) == 1, f"one engine process, not {len(engines)}"
    return engines[0]


def _is_running(process: psutil.Process) -> bool:
    """False also for a process that has ended but was not reaped by whoever inherited it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
