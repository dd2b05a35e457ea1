"""The engine's muscle: one `StepPlan` in, one `StepResult` out, on torch.

A step is one pass over the concatenated rows of everything in it, prompt chunks and decodes alike. What the
plan does not say (tokens of known sequences, block tables) is kept here, per sequence.

    begin(plan) ─► StepWork ─► compute(work) ─► end(work, result)

Only `compute` takes long. It reads and writes nothing that `begin` and `end` change for other sequences, so
that steps of different sequences may be computed by several threads at once (`engine/lanes.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.step import Chunk, CopyDone, SequenceStart, StepPlan, StepResult, TokenLogprobs
from penstock.engine.attention import AttentionBackend, SequenceRows
from penstock.engine.host_kv import HostKV
from penstock.engine.kv_store import KVStore
from penstock.engine.model import DecoderModel
from penstock.engine.sampling import SamplingRow, sample, token_logprobs
from penstock.engine.threads import Threads

PROMPT_LOGPROB_ROWS = 64  # logits of so many prompt rows exist at once

_NOTHING_BANNED: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Live:
    """What the executor knows of a sequence. `tokens` grows by what it samples."""

    start: SequenceStart
    tokens: list[int]

    def sampling_row(self) -> SamplingRow:
        output_len = len(self.tokens) - self.start.prompt_len
        banned = self.start.stop_token_ids if output_len < self.start.min_output_tokens else _NOTHING_BANNED
        return SamplingRow(self.start.sampling, self.tokens, self.start.prompt_len, banned)


@dataclass(slots=True)
class StepWork:
    """A step that has begun: everything that computing it reads, beside weights and pages."""

    chunks: list[Chunk]  # decodes as chunks of one
    lives: list[_Live]  # of each chunk
    token_ids: list[int]
    positions: list[int]
    rows: list[SequenceRows]
    threads: int


class TorchExecutor:
    """Runs plans on a model. Plans begin and end one after the other, on one thread."""

    def __init__(
        self,
        model: DecoderModel,
        store: KVStore,
        attention: AttentionBackend,
        threads: Threads,
        host: HostKV | None = None,
    ) -> None:
        self._model = model
        self._store = store
        self._host = host  # needed where plans have copies
        self._attention = attention
        self._threads = threads
        self._device = store.k.device
        self._live: dict[int, _Live] = {}
        self._decoding: dict[int, _Live] = {}  # those that have emitted, in order

    @property
    def store(self) -> KVStore:
        return self._store

    @property
    def threads(self) -> Threads:
        return self._threads

    def use_host(self, host: HostKV | None) -> None:
        """Another host memory, or none; nothing is under way."""
        self._host = host

    def reset(self) -> None:
        """Forget every sequence, as after a failed step. Pages keep their bytes; nobody points to them."""
        if self._host is not None:
            self._host.drain()
        for seq_id in self._live:
            self._store.release(seq_id)
        self._live.clear()
        self._decoding.clear()

    def forget(self, seq_ids: Sequence[int]) -> None:
        """These sequences have ended; their blocks may be given to others."""
        for seq_id in seq_ids:
            del self._live[seq_id]
            self._decoding.pop(seq_id, None)
            self._store.release(seq_id)

    def fill_pages(self, block_count: int) -> None:
        """Put plausible numbers into the first pages, as before a measurement that reads unwritten ones."""
        for pages in (self._store.k, self._store.v):
            pages[:, :block_count].normal_()

    def execute(self, plan: StepPlan) -> StepResult:
        """Raises whatever torch raises; the sequences of the plan are then in an unknown state."""
        self._take_in(plan)
        stalled_s = 0.0 if self._host is None else self._copy(plan, self._host)
        began_s = time.perf_counter()
        if not plan.token_count:
            return StepResult({}, copied=self._copied(), stalled_s=stalled_s)
        work = self._work(plan, None)
        result = self.compute(work)
        self.end(work, result)
        result.duration_s = time.perf_counter() - began_s
        result.copied, result.stalled_s = self._copied(), stalled_s
        return result

    def begin(self, plan: StepPlan, threads_max: int) -> StepWork:
        """Take in what the plan changes, and gather what it computes, on at most so many threads.

        The plan has no copies.
        """
        self._take_in(plan)
        return self._work(plan, threads_max)

    @torch.inference_mode()
    def compute(self, work: StepWork) -> StepResult:
        """One pass through the model, and a token of each chunk that emits. Raises whatever torch raises."""
        self._threads.use(work.threads)
        return self._sample(work, self._forward(work))

    def end(self, work: StepWork, result: StepResult) -> None:
        """Note the tokens. Who was forgotten since the step began gets none."""
        assert result.tokens is not None
        for chunk, live in zip(work.chunks, work.lives, strict=True):
            if chunk.emits and self._live.get(chunk.seq_id) is live:
                live.tokens.append(result.tokens[chunk.seq_id])
                self._decoding[chunk.seq_id] = live

    def _take_in(self, plan: StepPlan) -> None:
        self.forget(plan.ends)
        for start in plan.starts:
            self._begin(start)
        for seq_id, blocks in plan.new_blocks:
            self._store.extend(seq_id, blocks)

    def _copy(self, plan: StepPlan, host: HostKV) -> float:
        """Begin the plan's copies, and wait for those it needs. Returns how long that took."""
        host.begin(plan.copies)
        if not plan.waits:
            return 0.0
        began_s = time.perf_counter()
        host.wait(plan.waits)
        return time.perf_counter() - began_s

    def _copied(self) -> Sequence[CopyDone]:
        return () if self._host is None else self._host.take()

    def _begin(self, start: SequenceStart) -> None:
        assert start.tokens is not None, "the engine needs tokens, not only lengths"
        self._live[start.seq_id] = _Live(start, list(start.tokens))
        self._store.start(start.seq_id, start.blocks)

    def _decodes(self, plan: StepPlan) -> list[Chunk]:
        """The last token of every decoding sequence that the step advances, as chunks of one."""
        if not plan.decode_count:
            return []
        decodes = [
            Chunk(seq_id, len(live.tokens) - 1, 1, True)
            for seq_id, live in self._decoding.items()
            if seq_id not in plan.paused
        ]
        assert len(decodes) == plan.decode_count, "replica and executor agree on who decodes"
        return decodes

    def _work(self, plan: StepPlan, threads_max: int | None) -> StepWork:
        chunks = [*plan.chunks, *self._decodes(plan)]
        lives = [self._live[chunk.seq_id] for chunk in chunks]
        threads = self._threads.count_for(plan.token_count, threads_max)
        work = StepWork(chunks, lives, [], [], [], threads)
        for chunk, live in zip(chunks, lives, strict=True):
            stop = chunk.start + chunk.count
            table = self._store.table(chunk.seq_id)
            work.rows.append(SequenceRows(len(work.token_ids), chunk.count, chunk.start, table))
            work.token_ids += live.tokens[chunk.start : stop]
            work.positions += range(chunk.start, stop)
        return work

    def _forward(self, work: StepWork) -> Tensor:
        """Hidden states [rows, hidden] of all chunks, in order."""
        hidden = self._model.embed(torch.tensor(work.token_ids, device=self._device))
        positions = torch.tensor(work.positions, device=self._device)
        attention = self._attention.plan(work.rows, work.threads)
        return self._model.run(range(self._model.config.layers), hidden, positions, attention)

    def _sample(self, work: StepWork, hidden: Tensor) -> StepResult:
        tokens: dict[int, int] = {}
        result = StepResult(tokens)
        emitting: list[tuple[_Live, int]] = []  # with the row of its last token
        row = 0
        for chunk, live in zip(work.chunks, work.lives, strict=True):
            self._score_prompt(live, chunk, hidden[row : row + chunk.count], result)
            row += chunk.count
            if chunk.emits:
                emitting.append((live, row - 1))
        if not emitting:
            return result
        logits = self._model.logits(hidden[[last for _, last in emitting]])
        sampled = sample(logits, [live.sampling_row() for live, _ in emitting])
        for index, ((live, _), token_id) in enumerate(zip(emitting, sampled, strict=True)):
            seq_id, wanted = live.start.seq_id, live.start.sampling.logprobs
            if wanted is not None:
                result.logprobs[seq_id] = token_logprobs(logits[index], token_id, wanted)
            tokens[seq_id] = token_id
        return result

    def _score_prompt(self, live: _Live, chunk: Chunk, hidden: Tensor, result: StepResult) -> None:
        """Logprobs of the prompt tokens that follow this chunk's rows, where the request asks for them."""
        sampling = live.start.sampling
        count = min(chunk.count, live.start.prompt_len - 1 - chunk.start)
        if not sampling.prompt_logprobs or count <= 0:
            return
        scores: list[TokenLogprobs] = []
        for first in range(0, count, PROMPT_LOGPROB_ROWS):
            last = min(first + PROMPT_LOGPROB_ROWS, count)
            logits = self._model.logits(hidden[first:last])
            targets = live.tokens[chunk.start + first + 1 : chunk.start + last + 1]
            scores += [
                token_logprobs(line, target, sampling.logprobs or 0)
                for line, target in zip(logits, targets, strict=True)
            ]
        result.prompt_logprobs[chunk.seq_id] = scores
