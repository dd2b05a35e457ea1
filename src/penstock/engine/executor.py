"""The engine's muscle: one `StepPlan` in, one `StepResult` out, on torch.

A step is one pass over the concatenated rows of every item: prompt chunks and decodes alike. What the plan
does not say (tokens of known sequences, block tables) is kept here, per sequence.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.step import SequenceStart, StepItem, StepPlan, StepResult, TokenLogprobs
from penstock.engine.attention import AttentionBackend, SequenceRows
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


class TorchExecutor:
    """Runs plans on a model. Not thread-safe: plans come one after the other."""

    def __init__(
        self, model: DecoderModel, store: KVStore, attention: AttentionBackend, threads: Threads
    ) -> None:
        self._model = model
        self._store = store
        self._attention = attention
        self._threads = threads
        self._device = store.k.device
        self._live: dict[int, _Live] = {}

    def reset(self) -> None:
        """Forget every sequence, as after a failed step. Pages keep their bytes; nobody points to them."""
        for seq_id in self._live:
            self._store.release(seq_id)
        self._live.clear()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Raises whatever torch raises; the sequences of the plan are then in an unknown state."""
        began_s = time.perf_counter()
        for seq_id in plan.ends:
            del self._live[seq_id]
            self._store.release(seq_id)
        for start in plan.starts:
            self._begin(start)
        self._threads.use_for(plan.token_count)
        hidden = self._forward(plan.items)
        result = self._sample(plan.items, hidden)
        result.duration_s = time.perf_counter() - began_s
        return result

    def _begin(self, start: SequenceStart) -> None:
        assert start.tokens is not None, "the engine needs tokens, not only lengths"
        self._live[start.seq_id] = _Live(start, list(start.tokens))
        self._store.start(start.seq_id, start.blocks)

    def _forward(self, items: Sequence[StepItem]) -> Tensor:
        """Hidden states [rows, hidden] of all items, in order."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[SequenceRows] = []
        for item in items:
            if item.new_blocks:
                self._store.extend(item.seq_id, item.new_blocks)
            stop = item.start + item.count
            rows.append(SequenceRows(len(token_ids), item.count, item.start, self._store.table(item.seq_id)))
            token_ids += self._live[item.seq_id].tokens[item.start : stop]
            positions += range(item.start, stop)
        hidden = self._model.embed(torch.tensor(token_ids, device=self._device))
        attention = self._attention.plan(rows)
        layers = range(self._model.config.layers)
        return self._model.run(layers, hidden, torch.tensor(positions, device=self._device), attention)

    def _sample(self, items: Sequence[StepItem], hidden: Tensor) -> StepResult:
        result = StepResult([])
        emitting: list[tuple[StepItem, int]] = []  # with the row of its last token
        row = 0
        for item in items:
            self._score_prompt(item, hidden[row : row + item.count], result)
            row += item.count
            if item.emits:
                emitting.append((item, row - 1))
        if not emitting:
            return result
        logits = self._model.logits(hidden[[last for _, last in emitting]])
        lives = [self._live[item.seq_id] for item, _ in emitting]
        result.tokens = sample(logits, [live.sampling_row() for live in lives])
        for index, (live, token_id) in enumerate(zip(lives, result.tokens, strict=True)):
            wanted = live.start.sampling.logprobs
            if wanted is not None:
                result.logprobs[live.start.seq_id] = token_logprobs(logits[index], token_id, wanted)
            live.tokens.append(token_id)
        return result

    def _score_prompt(self, item: StepItem, hidden: Tensor, result: StepResult) -> None:
        """Logprobs of the prompt tokens that follow this chunk's rows, where the request asks for them."""
        live = self._live[item.seq_id]
        sampling = live.start.sampling
        count = min(item.count, live.start.prompt_len - 1 - item.start)
        if not sampling.prompt_logprobs or count <= 0:
            return
        scores: list[TokenLogprobs] = []
        for first in range(0, count, PROMPT_LOGPROB_ROWS):
            last = min(first + PROMPT_LOGPROB_ROWS, count)
            logits = self._model.logits(hidden[first:last])
            targets = live.tokens[item.start + first + 1 : item.start + last + 1]
            scores += [
                token_logprobs(line, target, sampling.logprobs or 0)
                for line, target in zip(logits, targets, strict=True)
            ]
        result.prompt_logprobs[item.seq_id] = scores
