"""The engine's loop: drain the inbox, plan, execute, complete, report; for ever."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Final

from penstock.core.errors import RequestError
from penstock.core.events import Finished, ReplicaEvent
from penstock.core.reasons import FinishReason
from penstock.core.settings import Settings
from penstock.core.step import StepPlan, StepResult
from penstock.core.step_trace import StepRecord, StepTimes
from penstock.engine.build import Engine
from penstock.engine.commands import Advise, Cancel, Close, Command, Submit
from penstock.engine.recording import Recording
from penstock.policies.stack import make_stack_of
from penstock.replica.messages import StepReport
from penstock.replica.replica import Replica

IDLE_TICK_S: Final = 0.25  # an idle loop turns so often, to keep its heartbeat alive
FAILURES_MAX: Final = 3  # steps that may fail in a row before the engine gives itself up


class EngineLoop:
    """One step at a time, on one replica."""

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
        self._replica = self._make_replica()
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
            self._close()

    def _make_replica(self) -> Replica:
        return Replica(self._engine.limits, make_stack_of(self._settings))

    def _close(self) -> None:
        self._recording.close()

    def _beat(self) -> None:
        self._heartbeat.value += 1

    def _turn(self) -> bool:
        """Inbox, one step, report. False when told to close."""
        self._beat()
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
        self._rest()
        while self._connection.poll():
            command: Command = self._connection.recv()
            if isinstance(command, Close):
                return False
            self._obey(command, events)
        return True

    def _rest(self) -> None:
        """Until there is something to do."""
        if not self._replica.has_work:
            self._connection.poll(IDLE_TICK_S)

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
        self._replica = self._make_replica()
        return events
