"""The engine process: one replica and its executor in a loop, behind a pipe.

    gateway process                          engine process
    EngineLink ── submit, cancel, close ──►  inbox ─► Replica.plan ─► TorchExecutor ─► Replica.complete
               ◄── StepReport a step ──────  events and stats

A process, not a thread: an engine step makes thousands of short torch calls, each of which would compete
with the event loop for the interpreter lock (measured by benchmarks/process.py). The loop takes its inbox
between steps, so a cancel frees its slot within one step.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import TYPE_CHECKING, Final

from penstock.core.errors import PenstockError, RequestError
from penstock.core.events import Finished, ReplicaEvent
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.core.step import StepPlan, StepResult
from penstock.core.step_trace import StepRecord, StepTimes
from penstock.engine.recording import Recording
from penstock.engine.threads import wait_briefly
from penstock.models.source import ModelSource
from penstock.policies.stack import make_stack_of
from penstock.replica.messages import Advice, ReplicaInfo, StepReport
from penstock.replica.replica import Replica

if TYPE_CHECKING:
    from penstock.engine.build import Engine

IDLE_TICK_S: Final = 0.25  # an idle loop turns so often, to keep its heartbeat alive
FAILURES_MAX: Final = 3  # steps that may fail in a row before the engine gives itself up


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class Advise:
    advice: Advice


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class StageDone:
    """Progress while starting."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The engine could not start; the error crosses the pipe as it is."""

    error: Exception


Command = Submit | Cancel | Advise | Close
Message = StageDone | StartFailed | ReplicaInfo | StepReport


def run_engine(
    connection: Connection,
    heartbeat: Synchronized[int],
    settings: Settings,
    source: ModelSource,
    model_name: str,
) -> None:
    """Entry point of the process."""
    # The gateway decides when to stop; a Ctrl-C on the terminal reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        loop = _start(connection, heartbeat, settings, source, model_name)
    except PenstockError as error:
        connection.send(StartFailed(error))
        return
    except Exception as error:  # the starting process must learn of any failure, whatever it is
        connection.send(StartFailed(RuntimeError(f"{type(error).__name__}: {error}")))
        raise
    try:
        loop.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the gateway is gone, and with it everybody who could read an answer


def _start(
    connection: Connection,
    heartbeat: Synchronized[int],
    settings: Settings,
    source: ModelSource,
    model_name: str,
) -> _Loop:
    wait_briefly()
    began_s = time.perf_counter()
    from penstock.engine.build import Stages, build_engine

    stages = Stages({"import": time.perf_counter() - began_s})
    engine = build_engine(settings, source, model_name, stages)
    recording = Recording(settings, engine.limits)
    with stages.timed("warm_up"):
        warm_up(engine, settings)
    for name, seconds in stages.seconds.items():
        connection.send(StageDone(name, seconds))
    connection.send(replace(engine.info, startup_s=stages.seconds))
    return _Loop(connection, heartbeat, engine, settings, recording)


def warm_up(engine: Engine, settings: Settings) -> None:
    """One short request through the real path, so that the first user does not pay for first calls."""
    replica = Replica(engine.limits, make_stack_of(settings))
    prompt = [0] * min(8, engine.limits.context_len_max - 2)
    replica.submit(Request("warm-up", len(prompt), 2, 0.0, prompt_tokens=prompt), 0.0)
    while (plan := replica.plan(0.0)) is not None:
        replica.complete(plan, engine.executor.execute(plan), 0.0)
    engine.executor.reset()


class _Loop:
    """Drain the inbox, plan, execute, complete, report; for ever."""

    def __init__(
        self,
        connection: Connection,
        heartbeat: Synchronized[int],
        engine: Engine,
        settings: Settings,
        recording: Recording,
    ) -> None:
        self._connection = connection
        self._heartbeat = heartbeat
        self._engine = engine
        self._settings = settings
        self._replica = Replica(engine.limits, make_stack_of(settings))
        self._failures = 0
        self._pins_told = 0
        self._left_s: float | None = None  # when the last step was done; None where there was no work since
        self._recording = recording
        self._is_watched = bool(settings.twin.profile)  # the gateway compares steps with a profile

    def run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self._recording.close()

    def _turn(self) -> bool:
        """Inbox, one step, report. False when told to close."""
        self._heartbeat.value += 1
        events: list[ReplicaEvent] = []
        if not self._drain_inbox(events):
            return False
        record = self._step(events)
        shown = record if self._is_watched else None
        stats = self._replica.stats()
        if events or shown is not None or stats.pins != self._pins_told:
            self._pins_told = stats.pins  # pins end while nothing runs, too
            self._connection.send(StepReport(events, stats, shown))
        return True

    def _drain_inbox(self, events: list[ReplicaEvent]) -> bool:
        """Take every waiting command; wait for one while idle. False when told to close."""
        wait_s = 0.0 if self._replica.has_work else IDLE_TICK_S
        while self._connection.poll(wait_s):
            wait_s = 0.0
            command: Command = self._connection.recv()
            if isinstance(command, Close):
                return False
            self._obey(command, events)
        return True

    def _obey(self, command: Submit | Cancel | Advise, events: list[ReplicaEvent]) -> None:
        now_s = time.monotonic()
        if isinstance(command, Advise):
            self._replica.advise(command.advice, now_s)
            self._recording.advised(command.advice, now_s)
            return
        if isinstance(command, Cancel):
            finished = self._replica.cancel(command.request_id, command.reason, now_s)
            self._recording.cancelled(command.request_id, command.reason, now_s)
            events += [finished] if finished is not None else []
            return
        request = command.request
        try:
            self._replica.submit(request, now_s)
        except RequestError as error:  # the desk checks feasibility first; whoever did not is still answered
            events.append(
                Finished(
                    request.id, now_s, FinishReason.REFUSED, request.prompt_len, 0, 0, detail=error.message
                )
            )
        else:
            self._recording.submitted(request, now_s)

    def _step(self, events: list[ReplicaEvent]) -> StepRecord | None:
        """Plan, execute, complete; adds to `events`. The step's record, where somebody wants it."""
        planned_s, plan_s = time.perf_counter(), time.monotonic()
        plan = self._replica.plan(plan_s)
        times = StepTimes(time.perf_counter() - planned_s, planned_s - (self._left_s or planned_s), plan_s)
        self._recording.planned(plan, plan_s)
        if plan is None:
            self._left_s = None
            return None
        try:
            result = self._engine.executor.execute(plan)
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError, also for lack of memory
            events += self._recover(error)
            return None
        return self._complete(plan, result, times, events)

    def _complete(
        self, plan: StepPlan, result: StepResult, times: StepTimes, events: list[ReplicaEvent]
    ) -> StepRecord | None:
        self._failures = 0
        done_s, now_s = time.perf_counter(), time.monotonic()
        told = self._replica.complete(plan, result, now_s)
        left_s = time.perf_counter()
        self._left_s = left_s if self._replica.has_work else None
        times = replace(times, schedule_s=times.schedule_s + left_s - done_s, ended_s=now_s)
        self._replica.stats().schedule_s = times.schedule_s
        self._check_invariants(plan.index)
        events += told
        return self._recording.completed(plan, result, told, times)

    def _check_invariants(self, step_index: int) -> None:
        """A debugging aid, off by default: an engine whose books are wrong must not go on."""
        every_steps = self._settings.replica.check_invariants_steps
        if every_steps and step_index % every_steps == 0:
            self._replica.check_invariants()

    def _recover(self, error: Exception) -> list[ReplicaEvent]:
        """Answer everything as failed and start from empty KV; a step that fails again and again is fatal."""
        self._failures += 1
        self._left_s = None
        print(f"engine step failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        events: list[ReplicaEvent] = []
        now_s = time.monotonic()
        events += self._replica.fail_all(f"the engine step failed: {type(error).__name__}", now_s)
        self._recording.failed(now_s)
        if self._failures >= FAILURES_MAX:
            self._connection.send(StepReport(events, self._replica.stats()))
            raise error
        self._engine.executor.reset()
        self._replica = Replica(self._engine.limits, make_stack_of(self._settings))
        return events
