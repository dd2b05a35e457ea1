"""What the engine process writes about its own work: the decision journal and the step trace, each if asked.

The loop tells everything it does; with nothing to write a call costs a comparison or two.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from penstock.core import step_trace
from penstock.core.events import ReplicaEvent
from penstock.core.line_file import LineFile
from penstock.core.reasons import CancelReason
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.core.step import StepPlan, StepResult
from penstock.core.step_trace import StepRecord, StepTimes
from penstock.policies.lanes import Lane
from penstock.policies.stack import terms_of
from penstock.replica import journal
from penstock.replica.journal import Journal
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import Advice
from penstock.replica.step_meter import StepMeter

SALT_BYTES: Final = 16
FLUSH_S: Final = 1.0


class Recording:
    """One engine's files. Lines reach the disk when the engine falls idle, and once a second while it works.

    So an engine that is killed loses the lines of its last second at most, and the step it was in.
    """

    def __init__(self, settings: Settings, limits: ReplicaLimits) -> None:
        """Creates the files that the settings name. Raises EnvironmentMissing."""
        wanted = settings.record
        self._files: list[LineFile] = []
        self._journal: Journal | None = None
        self._steps: LineFile | None = None
        if wanted.journal:
            file = self._open(wanted.journal, journal.header(limits, settings.policies, terms_of(settings)))
            self._journal = Journal(limits.kv_block_tokens, secrets.token_bytes(SALT_BYTES), file.write)
        if wanted.steps:
            self._steps = self._open(wanted.steps, step_trace.header())
        self._measures = bool(wanted.steps or settings.twin.profile)
        self._meter = StepMeter()
        self._idle: set[Lane | None] = set()  # who had nothing to do when asked last, and nothing came since
        self._flushed_s = 0.0  # on the engine's clock

    def submitted(self, request: Request, now_s: float) -> None:
        self._idle.clear()
        if self._journal is not None:
            self._journal.submitted(request, now_s)

    def cancelled(self, request_id: str, reason: CancelReason, now_s: float) -> None:
        self._idle.clear()
        if self._journal is not None:
            self._journal.cancelled(request_id, reason.value, now_s)

    def advised(self, advice: Advice, now_s: float) -> None:
        self._idle.clear()
        if self._journal is not None:
            self._journal.advised(advice, now_s)

    def planned(self, plan: StepPlan | None, now_s: float, lane: Lane | None = None) -> None:
        """The plans of who is idle are all alike, and only the first is written."""
        if plan is not None:
            self._idle.clear()
        elif lane in self._idle:
            return
        else:
            self._idle.add(lane)
        if self._journal is not None:
            self._journal.planned(plan, now_s, lane)
        is_idle = len(self._idle) == (1 if lane is None else len(Lane))
        if is_idle or now_s - self._flushed_s >= FLUSH_S:
            self._flush(now_s)

    def completed(
        self,
        plan: StepPlan,
        result: StepResult,
        events: Sequence[ReplicaEvent],
        times: StepTimes,
        lane: Lane | None = None,
    ) -> StepRecord | None:
        """The step's record, where anything reads one."""
        self._idle.clear()
        if self._journal is not None:
            self._journal.completed(result, events, times.ended_s, lane)
        record = self._meter.record(plan, result, times) if self._measures else None
        if not plan.token_count:
            record = None  # it only waited for copies
        if self._steps is not None and record is not None:
            self._steps.write(step_trace.line_of(record))
        if times.ended_s - self._flushed_s >= FLUSH_S:
            self._flush(times.ended_s)
        return record

    def failed(self, now_s: float) -> None:
        """A step failed; the replica and the executor begin anew."""
        self._meter = StepMeter()
        if self._journal is not None:
            self._journal.failed(now_s)
        self._flush(now_s)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _flush(self, now_s: float) -> None:
        self._flushed_s = now_s
        for file in self._files:
            file.flush()

    def _open(self, path: str, header: Mapping[str, object]) -> LineFile:
        file = LineFile(Path(path), header)
        self._files.append(file)
        return file
