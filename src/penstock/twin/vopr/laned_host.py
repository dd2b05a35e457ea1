"""An engine with two lanes in virtual time: both have a step in progress, commands are heard at once.

So a sequence may be cancelled, and its KV be wanted by others, while either lane still computes it. The
executor reads when a step begins and again when it ends, and writes when it ends, as late as a device may.
Tokens are always known here: there is no laned executor of lengths only.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.step import Chunk, StepPlan, StepResult
from penstock.policies.lanes import Lane
from penstock.policies.stack import lanes_split, make_stack
from penstock.replica.laned import LanedReplica, LaneStep
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.work import StepWork
from penstock.twin.vopr.checkers import Checkers
from penstock.twin.vopr.engine_host import Command, EngineHost
from penstock.twin.vopr.journal import Journal
from penstock.twin.vopr.plan_audit import PlanAudit
from penstock.twin.vopr.script import System
from penstock.twin.vopr.strict_executor import Live, OnBlock, StrictExecutor


def make_host(
    system: System, output_lens: dict[str, int], checkers: Checkers, journal: Journal
) -> EngineHost:
    """The engine of this system."""
    kind = LanedHost if lanes_split(system.policies) else EngineHost
    return kind(system, output_lens, checkers, journal)


@dataclass(slots=True)
class _InProgress:
    number: int
    step: LaneStep
    error: Exception | None
    began_s: float


class LanedHost(EngineHost):
    """As `EngineHost`, by lane. The heartbeat beats whenever a lane begins a step."""

    @property
    def may_begin(self) -> bool:
        return len(self._running) < len(Lane)

    def is_running(self, number: int) -> bool:
        return any(each.number == number for each in self._running.values())

    def still_s(self, now_s: float) -> float:
        return now_s - max((each.began_s for each in self._running.values()), default=now_s)

    def obey(self, command: Command, now_s: float) -> None:
        self._inbox.append(command)
        self.drain(now_s)

    def begin_steps(self, now_s: float, horizon_s: float) -> list[tuple[int, float]]:
        begun = []
        for lane in self._laned.plan_order:
            if lane in self._running:
                continue
            step = self._laned.plan_lane(lane, now_s)
            self._checkers.after_step(self._laned)
            if step is not None:
                begun.append(self._begin(step, now_s))
        if not self._running:
            self._checkers.idle(self._laned)
        return begun

    def complete_step(self, number: int, now_s: float) -> bool:
        lane = next(lane for lane, each in self._running.items() if each.number == number)
        ended = self._running.pop(lane)
        if ended.error is not None:
            self._recover(ended.error, now_s)
            return not self.is_dead
        self._failures = 0
        result = self._two_phase.end(lane)
        self._laned_audit.over(lane, ended.step.plan, result)
        for event in self._laned.complete_lane(ended.step, result, now_s):
            self._tell(event, now_s)
        self._checkers.after_step(self._laned)
        return True

    def kill(self) -> None:
        self._running.clear()
        super().kill()

    def _begin(self, step: LaneStep, now_s: float) -> tuple[int, float]:
        self.steps += 1
        self._journal.plan(step.plan)
        self._laned_audit.before_lane(step.lane, step.plan, self._checkers.output_ends())
        faults = self.faults.take()
        ends_s = now_s + self._system.step_base_s
        if faults.error is None or faults.computes_first:
            ends_s = now_s + self.cost.seconds(self._two_phase.begin(step))
        else:
            self._two_phase.hear(step.plan)  # the other lane goes on until the failure is noticed
        self._running[step.lane] = _InProgress(self.steps, step, faults.error, now_s)
        return self.steps, ends_s + faults.stall_s

    def _start_afresh(self) -> None:
        self._running: dict[Lane, _InProgress] = {}
        self._replica = self._laned = LanedReplica(self._limits, make_stack(self._system.policies))
        self._two_phase = TwoPhaseExecutor(
            self._system.block_tokens, self.cost, self._checkers.block_computed
        )
        self._executor = self._two_phase
        self._audit = self._laned_audit = _LanedAudit(self._system)
        self._checkers.engine_restarted()


@dataclass(slots=True)
class _Task:
    chunk: Chunk
    live: Live


class TwoPhaseExecutor(StrictExecutor):
    """Reads at both ends of a step, and writes at the last moment."""

    def __init__(self, block_tokens: int, cost: CostModel, on_block: OnBlock) -> None:
        super().__init__(block_tokens, cost, on_block)
        self._tasks: dict[Lane, list[_Task]] = {}

    def begin(self, step: LaneStep) -> StepWork:
        """Raises CheckFailed where KV that the step reads is not what it should be."""
        plan = step.plan
        self._take_in(plan)
        chunks = list(plan.chunks)
        if plan.decode_count:
            decodes = [seq_id for seq_id in self._decoding if seq_id not in plan.paused]
            chunks += [Chunk(seq_id, len(self._live[seq_id].values) - 1, 1, True) for seq_id in decodes]
        self._tasks[step.lane] = [_Task(chunk, self._live[chunk.seq_id]) for chunk in chunks]
        self._check(step.lane)
        prefills = [(chunk.count, chunk.start + chunk.count) for chunk in plan.chunks]
        return StepWork(prefills, plan.decode_count, step.batch.decode_context, len(chunks))

    def hear(self, plan: StepPlan) -> None:
        """Take in who comes and goes with a step that computes nothing."""
        self._take_in(plan)

    def end(self, lane: Lane) -> StepResult:
        self._check(lane)
        tokens: dict[int, int] = {}
        for task in self._tasks.pop(lane):
            chunk, live = task.chunk, task.live
            self._write(live, chunk.start, chunk.start + chunk.count)
            if chunk.emits and self._live.get(chunk.seq_id) is live:  # else it was cancelled meanwhile
                self._emit(live, chunk, tokens)
        return StepResult(tokens)

    def _check(self, lane: Lane) -> None:
        for task in self._tasks[lane]:
            self._check_history(task.live, task.chunk.start)


class _LanedAudit(PlanAudit):
    """Sequences may leave, and begin to decode, while a step of the other lane goes on."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self._decoding_now: list[int] = []

    def before_lane(self, lane: Lane, plan: StepPlan, output_ends: dict[str, int]) -> None:
        self.before(plan, output_ends)
        if lane is Lane.DECODE:
            rows = self._rows.items()
            self._decoding_now = [seq_id for seq_id, row in rows if row.decodes and seq_id not in plan.paused]

    def over(self, lane: Lane, plan: StepPlan, result: StepResult) -> None:
        if lane is Lane.DECODE:
            for row in (self._rows[seq_id] for seq_id in self._decoding_now if seq_id in self._rows):
                row.computed += result.steps
                row.known += result.steps
        for chunk in plan.chunks:
            if chunk.seq_id in self._rows:  # else it was cancelled meanwhile
                chunked = self._rows[chunk.seq_id]
                chunked.computed += chunk.count
                chunked.known += chunk.emits
                chunked.decodes |= chunk.emits
