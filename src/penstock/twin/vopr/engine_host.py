"""The engine process in virtual time: the loop of `engine/loop.py`, step by step, with faults.

obey(command) ─► inbox ─► drain ─► begin: plan, execute ······ complete: events, or recovery ─► events
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from penstock.core.errors import RequestError
from penstock.core.events import Finished, ReplicaEvent
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.step import StepPlan, StepResult
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica
from penstock.twin.executor import ModelledExecutor
from penstock.twin.host_link import NEVER, HostLink
from penstock.twin.vopr.checkers import Checkers
from penstock.twin.vopr.faults import FaultyCost, StepFaults
from penstock.twin.vopr.journal import Journal
from penstock.twin.vopr.plan_audit import PlanAudit
from penstock.twin.vopr.script import System
from penstock.twin.vopr.strict_executor import StrictExecutor

FAILURES_MAX = 3  # steps that may fail in a row before the engine gives itself up, as the process does


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    reason: CancelReason


Command = Submit | Cancel


@dataclass(slots=True)
class _Step:
    """A step in progress: what will be known when it ends."""

    plan: StepPlan
    result: StepResult | None
    error: Exception | None
    began_s: float


class EngineHost:
    """One engine. `events` gathers what the next report will say."""

    def __init__(
        self, system: System, output_lens: dict[str, int], checkers: Checkers, journal: Journal
    ) -> None:
        self._system = system
        self._output_lens = output_lens
        self._checkers = checkers
        self._journal = journal
        self._limits = ReplicaLimits(
            system.engine_blocks,
            system.block_tokens,
            system.running_max,
            system.step_tokens,
            system.context_len,
            system.prefix_cache,
            system.repeat,
            host_kv_blocks=system.host_kv_blocks,
            kv_group_tokens=system.kv_group_tokens,
            kv_block_bytes=1,
        )
        self.cost = FaultyCost(system)
        self.faults = StepFaults()
        self.events: list[ReplicaEvent] = []
        self.steps = 0
        self.restarts = 0
        self.is_dead = False
        self._failures = 0
        self._inbox: deque[Command] = deque()
        self._step: _Step | None = None
        self._start_afresh()

    @property
    def may_begin(self) -> bool:
        return self._step is None

    def is_running(self, number: int) -> bool:
        """Whether the step with this number goes on; they count from 1."""
        return number == self.steps

    def still_s(self, now_s: float) -> float:
        """For how long the heartbeat has stood still: it beats between steps, idle or busy."""
        step = self._step
        is_one = step is not None and (step.result is None or step.result.steps == 1)
        return now_s - step.began_s if step is not None and is_one else 0.0  # within a leap it beats

    def obey(self, command: Command, now_s: float) -> None:
        """A command arrives. While a step runs it waits, unless this engine listens meanwhile."""
        self._inbox.append(command)
        if self._step is None or self._system.mid_step:
            self.drain(now_s)

    def drain(self, now_s: float) -> None:
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, Cancel):
                finished = self._replica.cancel(command.request_id, command.reason, now_s)
                if finished is not None:
                    self._tell(finished, now_s)
                self._checkers.cancelled(command.request_id, finished, command.reason)
            else:
                self._submit(command.request, now_s)
            self._checkers.after_step(self._replica)

    def begin_steps(self, now_s: float, horizon_s: float) -> list[tuple[int, float]]:
        """Plan what can begin now and compute it. Number and end of every step that begins."""
        assert self._step is None and not self.is_dead
        plan = self._replica.plan(now_s)
        if plan is None:
            self._checkers.idle(self._replica)
            return []
        self.steps += 1
        self._journal.plan(plan)
        self._audit.before(plan, self._checkers.output_ends())
        faults = self.faults.take()
        result, ends_s = None, now_s + self._system.step_base_s
        if faults.error is None or faults.computes_first:
            result, ends_s = self._execute(plan, now_s, now_s if faults.is_armed else horizon_s)
            self._audit.after(plan, result)
        self._step = _Step(plan, result, faults.error, now_s)
        return [(self.steps, ends_s + faults.stall_s)]

    def complete_step(self, number: int, now_s: float) -> bool:
        """It is over; False when the engine is. A failed one costs everything that the engine holds."""
        step, self._step = self._step, None
        assert step is not None
        if step.error is not None:
            self._recover(step.error, now_s)
            return not self.is_dead
        assert step.result is not None
        self._failures = 0
        for event in self._replica.complete(step.plan, step.result, now_s):
            self._tell(event, now_s)
        self._checkers.after_step(self._replica)
        return True

    def kill(self) -> None:
        """The process is gone, with all that it had not said."""
        self.is_dead = True
        self._step = None
        self.events.clear()
        self._inbox.clear()
        self._checkers.engine_died()

    def fail_copy(self) -> None:
        """The next copy beside the steps will not succeed."""
        executor = self._executor
        host = executor.link if isinstance(executor, ModelledExecutor) else executor.host
        if host is not None:
            host.failures_due += 1

    def take_events(self) -> list[ReplicaEvent]:
        events, self.events = self.events, []
        return events

    def _submit(self, request: Request, now_s: float) -> None:
        self._checkers.submitted(request, now_s)
        try:
            self._replica.submit(request, now_s)
        except RequestError as error:
            self._checkers.turned_away(request.id)
            refusal = Finished(
                request.id, now_s, FinishReason.REFUSED, request.prompt_len, 0, 0, detail=error.message
            )
            self._journal.event(refusal)
            self.events.append(refusal)

    def _tell(self, event: ReplicaEvent, now_s: float) -> None:
        self._journal.event(event)
        self._checkers.event(event, now_s)
        if isinstance(event, Finished) and isinstance(self._executor, ModelledExecutor):
            self._executor.finish(event.request_id)
        self.events.append(event)

    def _execute(self, plan: StepPlan, now_s: float, horizon_s: float) -> tuple[StepResult, float]:
        """The result, and the instant at which the executor is done."""
        executor = self._executor
        if isinstance(executor, ModelledExecutor):
            executor.now_s, executor.horizon_s = now_s, horizon_s
            return executor.execute(plan), executor.now_s
        result = executor.execute(plan)
        return result, now_s + result.duration_s

    def _recover(self, error: Exception, now_s: float) -> None:
        """Answer everything as failed and start from empty KV; failing again and again is fatal."""
        self._failures += 1
        for finished in self._replica.fail_all(f"the engine step failed: {type(error).__name__}", now_s):
            self._tell(finished, now_s)
        self._checkers.after_step(self._replica)
        self._checkers.idle(self._replica)
        if self._failures >= FAILURES_MAX:
            self.is_dead = True
            self._checkers.engine_died()
            return
        self.restarts += 1
        self._start_afresh()

    def _make_link(self) -> HostLink | None:
        if not self._system.host_kv_blocks:
            return None
        block_s = self._system.copy_block_s
        return HostLink(1, 1, 0.0, 1.0 / block_s if block_s else NEVER)

    def _start_afresh(self) -> None:
        self._replica = Replica(self._limits, make_stack(self._system.policies))
        self._executor: StrictExecutor | ModelledExecutor = (
            StrictExecutor(self._system.block_tokens, self.cost, self._checkers.block_computed)
            if self._system.exact
            else ModelledExecutor(self.cost, self._output_lens, self._make_link())
        )
        self._audit = PlanAudit(self._system)
        self._checkers.engine_restarted()
