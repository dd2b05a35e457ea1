"""What has changed since the last plan, gathered until the next one hands it to the executor."""

from __future__ import annotations

from penstock.core.step import Chunk, Copy, SequenceStart, StepPlan
from penstock.replica.sequence import Sequence


class PlanDraft:
    """Starts, ends and new blocks of sequences. Each is told once."""

    def __init__(self) -> None:
        self._starts: dict[int, SequenceStart] = {}
        self._ends: list[int] = []
        self._new_blocks: list[tuple[int, list[int]]] = []
        self._void: dict[int, int] = {}  # seq_id → how many entries of `new_blocks` were made before it left
        self._copies: list[Copy] = []
        self._waits: dict[int, None] = {}

    def start(self, sequence: Sequence) -> None:
        self._starts[sequence.seq_id] = _start_message(sequence)

    def give(self, sequence: Sequence, blocks: list[int]) -> None:
        self._new_blocks.append((sequence.seq_id, blocks))

    def end(self, sequence: Sequence) -> None:
        """The executor is to forget the sequence, unless it has not heard of it yet."""
        if self._starts.pop(sequence.seq_id, None) is None:
            self._ends.append(sequence.seq_id)
        if self._new_blocks:  # it may be back within this plan, with other blocks
            self._void[sequence.seq_id] = len(self._new_blocks)

    def copy(self, copy: Copy) -> None:
        self._copies.append(copy)

    def wait(self, copy_id: int) -> None:
        """The next step begins when this copy is done."""
        self._waits[copy_id] = None

    def plan(
        self,
        index: int,
        chunks: list[Chunk],
        decode_count: int,
        paused: frozenset[int],
    ) -> StepPlan:
        """All that was gathered, as one plan; the draft is empty again."""
        new_blocks, self._new_blocks = self._new_blocks, []
        if self._void:
            void, self._void = self._void, {}
            new_blocks = [e for place, e in enumerate(new_blocks) if place >= void.get(e[0], 0)]
        starts, self._starts = list(self._starts.values()), {}
        ends, self._ends = self._ends, []
        plan = StepPlan(index, chunks, decode_count, paused, starts, ends, new_blocks)
        if self._copies:
            plan.copies, self._copies = self._copies, []
        if self._waits:
            plan.waits, self._waits = list(self._waits), {}
        return plan


def _start_message(sequence: Sequence) -> SequenceStart:
    request = sequence.request
    return SequenceStart(
        seq_id=sequence.seq_id,
        request_id=request.id,
        tokens=sequence.tokens(),
        prompt_len=request.prompt_len,
        total_len=sequence.total_len,
        cached_len=sequence.computed_len,
        blocks=tuple(sequence.blocks),
        sampling=request.sampling,
        min_output_tokens=request.min_output_tokens,
        stop_token_ids=request.stop_token_ids,
    )
