"""From plans to step records: what a step computes, told by the plan and by the plans before it.

A plan does not list who decodes, nor how long their contexts are. Like the replica's lane this moves all
decoding sequences by one addition, so that a record costs what changes, and not what runs.
"""

from __future__ import annotations

from penstock.core.step import StepPlan, StepResult
from penstock.core.step_trace import StepRecord, StepTimes


class StepMeter:
    """Follows one executor's plans, each once and in order. Knows lengths only."""

    def __init__(self) -> None:
        self._clock = 0  # decode steps so far
        self._offset: dict[int, int] = {}  # of those that decode: their KV holds clock + offset tokens
        self._context = 0  # tokens in the KV of all that decode

    def record(self, plan: StepPlan, result: StepResult, times: StepTimes) -> StepRecord:
        """The record of an executed plan of one step. Changes the meter."""
        assert result.steps == 1, "an engine that computes tokens makes one step at a time"
        for seq_id in plan.ends:
            self._leave(seq_id)
        prefills = tuple((chunk.count, chunk.start + chunk.count) for chunk in plan.chunks)
        decode_context = self._decode(plan) if plan.decode_count else 0
        emitting = [chunk for chunk in plan.chunks if chunk.emits]
        for chunk in emitting:
            self._join(chunk.seq_id, chunk.start + chunk.count)
        samples = plan.decode_count + len(emitting)
        return StepRecord(
            prefills,
            plan.decode_count,
            decode_context,
            samples,
            result.duration_s,
            times.schedule_s,
            times.between_s,
            times.ended_s,
        )

    def _decode(self, plan: StepPlan) -> int:
        """Advance all that decode but the paused; returns the sum of their contexts afterwards."""
        paused_context = 0
        for seq_id in plan.paused:
            paused_context += self._clock + self._offset[seq_id]
            self._offset[seq_id] -= 1  # stands still while the clock moves on
        self._clock += 1
        self._context += plan.decode_count
        return self._context - paused_context

    def _join(self, seq_id: int, computed_len: int) -> None:
        self._offset[seq_id] = computed_len - self._clock
        self._context += computed_len

    def _leave(self, seq_id: int) -> None:
        offset = self._offset.pop(seq_id, None)
        if offset is not None:  # else it ended before its first token
            self._context -= self._clock + offset
