"""An executor without a model that checks every byte of KV it reads.

It stores, for every position that it computes, the fold of the whole history in the block it was told to use,
and before computing looks whether the history is where it should be. So any mistake of sharing or accounting
either fails here or changes the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.step import Chunk, SequenceStart, StepPlan, StepResult
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.work import StepWork
from penstock.twin.vopr.content import fold, folds, next_token
from penstock.twin.vopr.failure import CheckFailed, require
from penstock.twin.vopr.strict_host import StrictHost

OnBlock = Callable[[str, int], None]


@dataclass(slots=True)
class Live:
    """One sequence, as the plans have told of it."""

    start: SequenceStart
    values: list[int]  # the fold at every known position
    blocks: list[int]


class StrictExecutor:
    """Runs plans; tells `on_block(request_id, fold)` of every block that it filled. Deterministic."""

    def __init__(self, block_tokens: int, cost: CostModel, on_block: OnBlock) -> None:
        self._block_tokens = block_tokens
        self._cost = cost
        self._on_block = on_block
        self._kv: dict[int, list[int]] = {}  # block → what its slots hold; 0: never written
        self._live: dict[int, Live] = {}
        self._decoding: dict[int, None] = {}
        self.host = StrictHost(self._kv)

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises CheckFailed where the plan reads KV that is not what it should be."""
        self._take_in(plan)
        copied = self.host.begin(plan)
        decodes = [seq_id for seq_id in self._decoding if plan.decode_count and seq_id not in plan.paused]
        tokens: dict[int, int] = {}
        prefills = [(chunk.count, chunk.start + chunk.count) for chunk in plan.chunks]
        context = sum(len(self._live[seq_id].values) for seq_id in decodes)
        for chunk in plan.chunks:
            self._compute(chunk, tokens)
        for seq_id in decodes:
            self._compute(Chunk(seq_id, len(self._live[seq_id].values) - 1, 1, True), tokens)
        work = StepWork(prefills, len(decodes), context, len(tokens))
        copied += self.host.end()
        return StepResult(tokens, duration_s=self._cost.seconds(work), copied=copied)

    def _take_in(self, plan: StepPlan) -> None:
        for seq_id in plan.ends:
            self._live.pop(seq_id)
            self._decoding.pop(seq_id, None)
        for start in plan.starts:
            require(start.tokens is not None, "plan", "a sequence starts without its tokens")
            assert start.tokens is not None
            self._live[start.seq_id] = Live(start, folds(start.tokens), list(start.blocks))
        for seq_id, blocks in plan.new_blocks:
            self._live[seq_id].blocks += blocks

    def _compute(self, chunk: Chunk, tokens: dict[int, int]) -> None:
        live = self._live[chunk.seq_id]
        self._check_history(live, chunk.start)
        self._write(live, chunk.start, chunk.start + chunk.count)
        if chunk.emits:
            self._emit(live, chunk, tokens)

    def _emit(self, live: Live, chunk: Chunk, tokens: dict[int, int]) -> None:
        token = next_token(live.values[chunk.start + chunk.count - 1], live.start.sampling.seed)
        live.values.append(fold(live.values[-1], token))
        tokens[chunk.seq_id] = token
        self._decoding[chunk.seq_id] = None

    def _check_history(self, live: Live, length: int) -> None:
        """The first `length` positions are in the sequence's blocks, block by block."""
        size = self._block_tokens
        for index in range(-(-length // size)):
            first = index * size
            expected = live.values[first : min(first + size, length)]
            held = self._kv.get(live.blocks[index], [])
            if held[: len(expected)] != expected:
                raise CheckFailed(
                    "kv-content",
                    f"{live.start.request_id} reads {first} to {first + len(expected) - 1} in block "
                    f"{live.blocks[index]}, which holds something else",
                )

    def _write(self, live: Live, start: int, stop: int) -> None:
        size = self._block_tokens
        for position in range(start, stop):
            block, slot = live.blocks[position // size], position % size
            slots = self._kv.setdefault(block, [0] * size)
            slots[slot] = live.values[position]
            if slot == size - 1:
                self._on_block(live.start.request_id, live.values[position])
