"""The gateway's handle on an engine process: starts it, feeds it, reads its reports, notices its death."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from penstock.core.errors import EnvironmentMissing, PenstockError, WarmingUp
from penstock.core.reasons import CancelReason
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.engine.commands import Advise, Cancel, Close, Command, StageDone, StartFailed, Submit
from penstock.engine.worker import run_engine
from penstock.models.source import ModelSource
from penstock.replica.messages import Advice, ReplicaDied, ReplicaInfo, StepReport

ReportCallback = Callable[[StepReport | ReplicaDied], None]


class EngineLink:
    """A `ReplicaLink` to a process of our own.

    Two threads: one writes commands (a pipe may be full, and a caller must never wait), one reads reports.
    """

    def __init__(self, settings: Settings, source: ModelSource, model_name: str, engine: str = "0") -> None:
        # `spawn`: a forked child of a process with threads and torch may deadlock.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._heartbeat = context.Value("q", 0, lock=False)
        self._process = context.Process(
            target=run_engine,
            args=(theirs, self._heartbeat, settings, source, model_name),
            name=f"penstock-engine-{engine}",
            daemon=True,
        )
        self._engine = engine
        self._info: ReplicaInfo | None = None
        self._callback: ReportCallback | None = None
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._process.start()
        theirs.close()

    @property
    def info(self) -> ReplicaInfo:
        if self._info is None:
            raise WarmingUp("The model is still loading.", retry_after_s=1.0)
        return self._info

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait_ready(self, on_stage: Callable[[str, float], None] = lambda name, seconds: None) -> ReplicaInfo:
        """Block until the model is loaded. Raises the engine's own error if it cannot start."""
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, StageDone):
                    on_stage(message.name, message.seconds)
                elif isinstance(message, ReplicaInfo):
                    self._info = replace(message, engine=self._engine)
                    return self._info
                else:
                    assert isinstance(message, StartFailed)
                    raise _start_error(message.error)
        except (EOFError, ConnectionResetError):
            self._process.join(5.0)
            raise EnvironmentMissing(
                f"The engine process ended while starting (exit code {self._process.exitcode})",
                hint="Look at its messages above; too little memory is the usual cause.",
            ) from None

    def on_report(self, callback: ReportCallback) -> None:
        assert self._callback is None and self._info is not None
        self._callback = callback
        for target in (self._read, self._write):
            thread = threading.Thread(target=target, name=f"engine-{target.__name__.strip('_')}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, request: Request) -> None:
        self._commands.put(Submit(request))

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        self._commands.put(Cancel(request_id, reason))

    def advise(self, advice: Advice) -> None:
        self._commands.put(Advise(advice))

    def heartbeat(self) -> int:
        return int(self._heartbeat.value)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def close(self, timeout_s: float) -> None:
        """Ask the process to end, then make it. Safe to call twice."""
        if self._threads:
            self._commands.put(Close())
            self._commands.put(None)
        else:
            with contextlib.suppress(OSError):
                self._connection.send(Close())
        self._process.join(timeout_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(timeout_s)

    def _read(self) -> None:
        assert self._callback is not None
        try:
            while True:
                self._callback(self._connection.recv())
        except (EOFError, OSError):
            self._process.join(1.0)
            code = self._process.exitcode
            self._callback(ReplicaDied(f"the engine process ended (exit code {code})"))

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the process is gone; the reader says so
            while (command := self._commands.get()) is not None:
                self._connection.send(command)


def _start_error(error: Exception) -> PenstockError:
    if isinstance(error, PenstockError):
        return error
    return EnvironmentMissing(
        f"The engine could not start: {error}", hint="Run `penstock serve` again; report it if it persists."
    )
