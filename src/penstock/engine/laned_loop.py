"""The engine's loop with two lanes: a step of each may be in progress, and the loop waits for either."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized

from penstock.core.events import ReplicaEvent
from penstock.core.settings import Settings
from penstock.core.step import StepResult
from penstock.core.step_trace import StepRecord, StepTimes
from penstock.engine.build import Engine
from penstock.engine.lanes import EngineLanes
from penstock.engine.loop import IDLE_TICK_S, EngineLoop
from penstock.engine.recording import Recording
from penstock.policies.stack import make_stack_of
from penstock.replica.laned import LanedReplica, LaneStep


class LanedLoop(EngineLoop):
    """As `EngineLoop`. A cancel is obeyed at once; its blocks are free when the step that reads them ends.

    Like a loop that stands in its step, the heart beats when the oldest step in progress has ended: a lane
    that hangs shows, also while the other one goes on.
    """

    def __init__(
        self,
        connection: Connection,
        heartbeat: Synchronized[int],
        engine: Engine,
        settings: Settings,
        recording: Recording,
    ) -> None:
        super().__init__(connection, heartbeat, engine, settings, recording)
        self._lanes = EngineLanes(engine.executor)
        self._oldest_s: float | None = None

    def _make_replica(self) -> LanedReplica:
        self._laned = LanedReplica(self._engine.limits, make_stack_of(self._settings))
        return self._laned

    def _close(self) -> None:
        self._lanes.close()
        super()._close()

    def _beat(self) -> None:
        oldest_s = self._lanes.oldest_s
        if oldest_s is None or oldest_s != self._oldest_s:
            super()._beat()
        self._oldest_s = oldest_s

    def _rest(self) -> None:
        is_waiting = self._lanes.oldest_s is not None or not self._replica.has_work
        self._lanes.wait(self._connection, IDLE_TICK_S if is_waiting else 0.0)

    def _step(self, events: list[ReplicaEvent]) -> StepRecord | None:
        """Account the steps that are over, then let every idle lane begin what it can; adds to `events`."""
        for ended in self._lanes.take():
            if isinstance(ended.outcome, (RuntimeError, MemoryError)):
                events += self._recover(ended.outcome)
                break  # what else has ended was of the replica that is gone
            if isinstance(ended.outcome, Exception):
                raise ended.outcome
            self._account(ended.step, ended.outcome, events)
        laned = self._laned
        for lane in laned.plan_order:
            if lane not in laned.in_progress:
                now_s = time.monotonic()
                step = laned.plan_lane(lane, now_s)
                self._recording.planned(None if step is None else step.plan, now_s, lane)
                if step is not None:
                    self._lanes.begin(step)
        return None

    def _account(self, step: LaneStep, result: StepResult, events: list[ReplicaEvent]) -> None:
        self._failures = 0
        began_s, now_s = time.perf_counter(), time.monotonic()
        told = self._laned.complete_lane(step, result, now_s)
        schedule_s = time.perf_counter() - began_s
        self._laned.stats().schedule_s = schedule_s
        self._check_invariants(step.plan.index)
        events += told
        times = StepTimes(schedule_s, 0.0, now_s)
        self._recording.completed(step.plan, result, told, times, step.lane)

    def _recover(self, error: Exception) -> list[ReplicaEvent]:
        self._lanes.drain()
        return super()._recover(error)
