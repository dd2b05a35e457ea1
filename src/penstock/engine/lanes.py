"""Two lanes on one engine: a thread for prompts and one for decodes, over the same weights and KV pages.

    LanedReplica.plan_lane ─► begin ─► the lane's thread computes ─► take ─► LanedReplica.complete_lane

A lane's share of the device becomes a share of the cores. Torch lets go of the interpreter lock inside each
of its calls, so that both threads compute at once; everything but computing happens on the caller's thread.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from typing import Final

from penstock.core.step import StepResult
from penstock.engine.executor import StepWork, TorchExecutor
from penstock.policies.lanes import Lane
from penstock.replica.laned import LaneStep

CLOSE_S: Final = 10.0


@dataclass(slots=True)
class Ended:
    """A step that is over, with its result or with what went wrong."""

    step: LaneStep
    outcome: StepResult | Exception


@dataclass(slots=True)
class _Task:
    step: LaneStep
    work: StepWork


class EngineLanes:
    """Computes a step of each lane at a time. All calls come from one thread."""

    def __init__(self, executor: TorchExecutor) -> None:
        self._executor = executor
        self._cores = executor.threads.most
        self._tasks: dict[Lane, SimpleQueue[_Task | None]] = {lane: SimpleQueue() for lane in Lane}
        self._over: SimpleQueue[tuple[_Task, StepResult | Exception]] = SimpleQueue()
        self._began_s: dict[Lane, float] = {}
        self._bell, self._ringer = Pipe(duplex=False)
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"{lane.value} lane", daemon=True)
            for lane in Lane
        ]
        for thread in self._threads:
            thread.start()

    @property
    def oldest_s(self) -> float | None:
        """When the oldest step in progress began, on this class's own clock; None where there is none."""
        return min(self._began_s.values(), default=None)

    def threads_of(self, share: float) -> int:
        """Cores of a lane with this share of the device: at least one."""
        return min(self._cores, max(1, round(share * self._cores)))

    def begin(self, step: LaneStep) -> None:
        """The lane's step begins."""
        assert step.lane not in self._began_s, "a lane computes one step at a time"
        work = self._executor.begin(step.plan, self.threads_of(step.share))
        self._began_s[step.lane] = time.perf_counter()
        self._tasks[step.lane].put(_Task(step, work))

    def wait(self, also: Connection | None, timeout_s: float | None) -> None:
        """Until a step is over, or there is something to read from `also`, or so long."""
        wait([self._bell, *([] if also is None else [also])], timeout_s)

    def take(self) -> list[Ended]:
        """The steps that are over and were not taken yet, in the order of their ends."""
        ended = []
        while self._bell.poll():
            self._bell.recv_bytes()
            task, outcome = self._over.get()
            del self._began_s[task.step.lane]
            if not isinstance(outcome, Exception):
                self._executor.end(task.work, outcome)
            ended.append(Ended(task.step, outcome))
        return ended

    def drain(self) -> None:
        """Wait for the steps in progress and drop their results, as after a failure."""
        while self._began_s:
            self._bell.recv_bytes()
            task, _ = self._over.get()
            del self._began_s[task.step.lane]

    def close(self) -> None:
        for tasks in self._tasks.values():
            tasks.put(None)
        for thread in self._threads:
            thread.join(CLOSE_S)

    def _run(self, lane: Lane) -> None:
        """A lane's thread."""
        tasks = self._tasks[lane]
        while (task := tasks.get()) is not None:
            began_s = time.perf_counter()
            outcome: StepResult | Exception
            try:
                outcome = self._executor.compute(task.work)
                outcome.duration_s = time.perf_counter() - began_s
            except Exception as error:  # whatever it is, whoever waits for the step must learn of it
                outcome = error
            self._over.put((task, outcome))
            self._ringer.send_bytes(b".")
