"""Checks each plan against what went before, from the executor's side, whatever executor runs it.

It keeps books of its own, made of plans and results alone: who lives, how much of each has KV, in which
blocks. A plan that a careful executor could not run fails here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from penstock.core.step import SequenceStart, StepPlan, StepResult
from penstock.twin.vopr.failure import require
from penstock.twin.vopr.script import System

BUDGET_IS_FOR_PROMPTS: Final = ("selective-batching",)  # composes that take every decode besides


@dataclass(slots=True)
class _Row:
    """One live sequence. `known` tokens, of which `computed` have KV."""

    known: int
    computed: int
    blocks: list[int]
    output_end: int  # the length it may reach at most
    decodes: bool = False


class PlanAudit:
    """Feed it every plan before, and every result after, in order. Raises CheckFailed."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._rows: dict[int, _Row] = {}
        self._holders: Counter[int] = Counter()
        self._last_index = -1
        self._guarded: dict[int, set[int]] = {}  # copy_id → device blocks, while it is under way

    def before(self, plan: StepPlan, output_ends: dict[str, int]) -> None:
        """`output_ends`: for each request, the length at which its output must end."""
        require(plan.index > self._last_index, "plan", "plans are numbered upwards")
        self._last_index = plan.index
        for seq_id in plan.ends:
            self._end(seq_id)
        for start in plan.starts:
            self._start(start, output_ends[start.request_id])
        for seq_id, blocks in plan.new_blocks:
            require(seq_id in self._rows, "plan", f"sequence {seq_id} gets a block and is not here")
            self._hold(self._rows[seq_id], blocks)
        for copy in plan.copies:
            extents = copy.extents
            self._guarded[copy.copy_id] = {d + i for d, _, count in extents for i in range(count)}
        for copy_id in plan.waits:
            self._guarded.pop(copy_id, None)
        require(len(self._rows) <= self._system.running_max, "running-max", f"{len(self._rows)} run at once")
        self._check_chunks(plan)
        self._check_decodes(plan)
        self._check_size(plan)

    def after(self, plan: StepPlan, result: StepResult) -> None:
        """Move the books on by what was computed."""
        for done in result.copied:
            self._guarded.pop(done.copy_id, None)
        decoders = [] if not plan.decode_count else self._decoders(plan)
        for row in decoders:
            row.computed += result.steps
            row.known += result.steps
        for chunk in plan.chunks:
            row = self._rows[chunk.seq_id]
            row.computed += chunk.count
            if chunk.emits:
                row.known += 1
                row.decodes = True

    def _start(self, start: SequenceStart, output_end: int) -> None:
        require(start.seq_id not in self._rows, "plan", f"sequence {start.seq_id} starts while it runs")
        size = self._system.block_tokens
        require(0 <= start.cached_len < start.total_len, "plan", f"{start!r} has nothing to compute")
        if not self._system.host_kv_blocks:  # what the host had may end within a block
            require(start.cached_len % size == 0, "plan", f"{start!r} shares part of a block")
        row = _Row(start.total_len, start.cached_len, [], output_end)
        self._rows[start.seq_id] = row
        self._hold(row, list(start.blocks))

    def _hold(self, row: _Row, blocks: list[int]) -> None:
        limit = self._system.engine_blocks
        require(all(0 <= block < limit for block in blocks), "plan", f"{blocks} are not all blocks")
        row.blocks += blocks
        self._holders.update(blocks)

    def _end(self, seq_id: int) -> None:
        require(seq_id in self._rows, "plan", f"sequence {seq_id} ends and is not here")
        self._holders.subtract(self._rows.pop(seq_id).blocks)

    def _decoders(self, plan: StepPlan) -> list[_Row]:
        return [row for seq_id, row in self._rows.items() if row.decodes and seq_id not in plan.paused]

    def _check_chunks(self, plan: StepPlan) -> None:
        require(
            len({c.seq_id for c in plan.chunks}) == len(plan.chunks), "plan", "two chunks of one sequence"
        )
        for chunk in plan.chunks:
            row = self._rows.get(chunk.seq_id)
            require(row is not None and not row.decodes, "plan", f"{chunk} is of nobody who prefills")
            assert row is not None
            require(chunk.start == row.computed and chunk.count >= 1, "plan", f"{chunk} does not go on")
            stop = chunk.start + chunk.count
            require(stop <= row.known, "plan", f"{chunk} goes beyond the known tokens")
            require(chunk.emits == (stop == row.known), "plan", f"{chunk} emits at the wrong place")
            self._check_private(row, chunk.start, stop)

    def _check_decodes(self, plan: StepPlan) -> None:
        decoders = self._decoders(plan)
        require(plan.decode_count in (0, len(decoders)), "plan", f"{plan.decode_count} decodes, not all")
        require(plan.repeat >= 1, "plan", "a plan stands for no step")
        if not plan.token_count:
            require(bool(plan.waits) and plan.repeat == 1, "plan", "a step that computes and awaits nothing")
            return
        if not plan.decode_count:
            require(bool(plan.chunks) and plan.repeat == 1, "plan", "a step that computes nothing")
            return
        for row in decoders:
            self._check_private(row, row.computed, row.computed + 1)
        if plan.repeat > 1:
            require(not plan.chunks and not plan.paused, "plan", "a standing plan does more than decode")
            left = min(row.output_end - row.known for row in decoders)
            require(plan.repeat <= left, "repeat", f"{plan.repeat} steps, and somebody ends after {left}")

    def _check_private(self, row: _Row, start: int, stop: int) -> None:
        """The positions to be written have a block each, which nobody else reads."""
        size = self._system.block_tokens
        require(stop <= len(row.blocks) * size, "plan", f"no block for position {stop - 1}")
        written = row.blocks[start // size : -(-stop // size)]
        require(all(self._holders[block] == 1 for block in written), "kv-private", f"{written} are shared")
        guarded = [copy_id for copy_id, blocks in self._guarded.items() if not blocks.isdisjoint(written)]
        require(not guarded, "kv-guard", f"{written} are written beside copies {guarded}")

    def _check_size(self, plan: StepPlan) -> None:
        """The step's budget; only a lone chunk may exceed it (policies that do not cut prompts)."""
        decodes = 0 if self._system.compose in BUDGET_IS_FOR_PROMPTS else plan.decode_count
        if len(plan.chunks) > 1 or (plan.chunks and decodes):
            tokens = sum(chunk.count for chunk in plan.chunks) + decodes
            fits = tokens <= self._system.step_tokens
            require(fits, "step-budget", f"{tokens} tokens in a step of {self._system.step_tokens}")
