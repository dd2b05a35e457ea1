"""An executor without a model, strict about KV: it stores the token of every position in the block it was
told to use, and before computing checks that the whole history of the sequence is where it should be. The
next token is a function of that history alone, so any mistake of sharing or accounting changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import Chunk, SequenceStart, StepPlan, StepResult
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
    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.kv: dict[tuple[int, int], int] = {}
        self.live: dict[int, tuple[SequenceStart, list[int], list[int]]] = {}
        self.decoding: dict[int, None] = {}
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
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
        for chunk in plan.chunks:
            self._compute(chunk, result)
        for seq_id in decodes:
            self._compute(Chunk(seq_id, len(self.live[seq_id][1]) - 1, 1, True), result)
        return result

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
    **policies: str,
) -> Replica:
    limits = ReplicaLimits(
        kv_blocks, kv_block_tokens, running_max, step_tokens_max, context_len_max, prefix_cache, repeat
    )
    return Replica(limits, make_stack(PolicySettings(**policies)))
