"""An executor without a model, strict about KV: it stores the token of every position in the block it was
told to use, and before computing checks that the whole history of the sequence is where it should be. The
next token is a function of that history alone, so any mistake of sharing or accounting changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import Chunk, Copy, CopyDone, Direction, SequenceStart, StepPlan, StepResult
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

VOCAB = 1000


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(repr(list(tokens)).encode()) % VOCAB


def expected_output(request: Request) -> list[int]:
    """What any schedule must produce: the stop token is not part of it."""
    tokens, output = list(request.prompt_tokens or ()), []
    while len(output) < request.max_output_tokens:
        token = next_token(tokens)
        if token in request.stop_token_ids:
            break
        tokens.append(token)
        output.append(token)
    return output


class FakeExecutor:
    """`copy_steps`: a copy that no step waits for is done after so many steps. Until then what it reads must
    not change, and what it writes holds nothing. `fails`: which of these copies fail.
    """

    def __init__(
        self, block_tokens: int, copy_steps: int = 1, fails: Callable[[Copy], bool] = lambda copy: False
    ) -> None:
        self.block_tokens = block_tokens
        self.host_kv: dict[tuple[int, int], int] = {}
        self._copy_steps, self._fails = copy_steps, fails
        self._flying: list[tuple[Copy, int, dict[tuple[int, int], int | None]]] = []  # with what they read
        self._steps = 0
        self.copies: list[Copy] = []
        self.kv: dict[tuple[int, int], int] = {}
        self.live: dict[int, tuple[SequenceStart, list[int], list[int]]] = {}
        self.decoding: dict[int, None] = {}
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self._steps += 1
        copied = self._copy(plan)
        for seq_id in plan.ends:
            del self.live[seq_id]
        for start in plan.starts:
            assert start.tokens is not None and len(start.tokens) == start.total_len
            self.live[start.seq_id] = (start, list(start.tokens), list(start.blocks))
        for seq_id, blocks in plan.new_blocks:
            self.live[seq_id][2].extend(blocks)
        for seq_id in plan.ends:
            self.decoding.pop(seq_id, None)
        decodes = [seq_id for seq_id in self.decoding if plan.decode_count and seq_id not in plan.paused]
        assert len(decodes) == plan.decode_count
        result = StepResult({})
        assert plan.token_count or plan.waits, "a plan computes something, or waits for something"
        for chunk in plan.chunks:
            self._compute(chunk, result)
        for seq_id in decodes:
            self._compute(Chunk(seq_id, len(self.live[seq_id][1]) - 1, 1, True), result)
        while self._flying and self._flying[0][1] <= self._steps:
            copied.append(self._land(waited=False))
        result.copied = copied
        return result

    def _copy(self, plan: StepPlan) -> list[CopyDone]:
        """Begin the plan's copies and finish those it waits for. Copies end in order."""
        for copy in plan.copies:
            self.copies.append(copy)
            self._flying.append((copy, self._steps + self._copy_steps - 1, {}))
        copied = []
        for copy_id in plan.waits:
            while any(copy.copy_id == copy_id for copy, _, _ in self._flying):
                copied.append(self._land(waited=self._flying[0][0].copy_id in plan.waits))
        for copy, _, read in self._flying:
            source, target = self._sides(copy)
            for first in range(len(source)):
                if copy.direction is Direction.OUT:
                    read.setdefault(source[first], self.kv.get(source[first]))
                else:
                    self.kv.pop(target[first], None)
        return copied

    def _land(self, waited: bool) -> CopyDone:
        copy, _, read = self._flying.pop(0)
        is_good = waited or not self._fails(copy)
        source, target = self._sides(copy)
        is_out = copy.direction is Direction.OUT
        held, written = (self.kv, self.host_kv) if is_out else (self.host_kv, self.kv)
        assert all(self.kv.get(slot) == value for slot, value in read.items()), "nobody wrote what was copied"
        for from_slot, to_slot in zip(source, target, strict=True):
            if is_good and from_slot in held:
                written[to_slot] = held[from_slot]
            else:
                written.pop(to_slot, None)
        return CopyDone(copy.copy_id, 0.25 * copy.block_count, is_good)

    def _sides(self, copy: Copy) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Every slot that is read, and the one that it goes to."""
        places = range(self.block_tokens)
        blocks = [(device + i, host + i) for device, host, count in copy.extents for i in range(count)]
        on_device = [(device, place) for device, _ in blocks for place in places]
        on_host = [(host, place) for _, host in blocks for place in places]
        return (on_device, on_host) if copy.direction is Direction.OUT else (on_host, on_device)

    def _compute(self, chunk: Chunk, result: StepResult) -> None:
        _, tokens, blocks = self.live[chunk.seq_id]
        for position in range(chunk.start):
            assert self.kv[self._slot(blocks, position)] == tokens[position], "KV of the history is intact"
        for position in range(chunk.start, chunk.start + chunk.count):
            self.kv[self._slot(blocks, position)] = tokens[position]
        assert chunk.emits == (chunk.start + chunk.count == len(tokens))
        if chunk.emits:
            tokens.append(next_token(tokens))
            assert result.tokens is not None
            result.tokens[chunk.seq_id] = tokens[-1]
            self.decoding[chunk.seq_id] = None

    def _slot(self, blocks: list[int], position: int) -> tuple[int, int]:
        return blocks[position // self.block_tokens], position % self.block_tokens


def make_replica(
    *,
    kv_blocks: int = 64,
    kv_block_tokens: int = 4,
    running_max: int = 8,
    step_tokens_max: int = 32,
    context_len_max: int = 512,
    prefix_cache: bool = True,
    repeat: bool = True,
    host_kv_blocks: int = 0,
    kv_group_tokens: int = 0,
    options: dict[str, dict[str, Any]] | None = None,
    **policies: str,
) -> Replica:
    limits = ReplicaLimits(
        kv_blocks,
        kv_block_tokens,
        running_max,
        step_tokens_max,
        context_len_max,
        prefix_cache,
        repeat,
        host_kv_blocks=host_kv_blocks,
        kv_group_tokens=kv_group_tokens,
        kv_block_bytes=100,
    )
    return Replica(limits, make_stack(PolicySettings(**policies, options=options or {})))
