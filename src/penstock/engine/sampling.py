"""Drawing the next token from logits.

Law: the token at output position i of a request is a pure function of its logits, its history and (seed, i).
Nothing here depends on the batch, so a preempted or migrated request goes on exactly as it would have.
Each row is therefore worked on by itself; only the greedy rows share an argmax, which rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.core.request import SamplingParams
from penstock.core.step import TokenLogprobs

TOP_CANDIDATES = 1024  # tried before the whole vocabulary is sorted


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits to draw from. `tokens` is prompt and output so far."""

    params: SamplingParams
    tokens: Sequence[int]
    prompt_len: int
    banned: frozenset[int]  # tokens that may not be drawn here (stop tokens below `min_output_tokens`)

    @property
    def needs_work(self) -> bool:
        """Whether the logits are changed before the draw."""
        p = self.params
        return bool(
            self.banned
            or p.logit_bias
            or p.presence_penalty
            or p.frequency_penalty
            or p.repetition_penalty != 1.0
        )


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token for each row of `logits` (float32[rows, vocab], which is left unchanged)."""
    tokens = torch.argmax(logits, dim=-1).tolist()
    for index, row in enumerate(rows):
        if row.params.is_greedy and not row.needs_work:
            continue
        adjusted = _adjust(logits[index], row) if row.needs_work else logits[index]
        tokens[index] = int(torch.argmax(adjusted)) if row.params.is_greedy else _draw(adjusted, row)
    return tokens


def token_logprobs(logits: Tensor, token_id: int, top_count: int) -> TokenLogprobs:
    """Of one row, before temperature and penalties, as OpenAI and vLLM report them."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if top_count:
        values, ids = torch.topk(logprobs, min(top_count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token_id]), top)


def _adjust(logits: Tensor, row: SamplingRow) -> Tensor:
    """Penalties and bias, in vLLM's order: repetition, frequency, presence, then bias and bans."""
    p = row.params
    logits = logits.clone()
    vocab = len(logits)
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = torch.bincount(
            torch.tensor(row.tokens[row.prompt_len :], dtype=torch.int64), minlength=vocab
        )
        counts = counts.to(logits.device, logits.dtype)
        logits -= p.frequency_penalty * counts
        logits -= p.presence_penalty * (counts > 0)
    for token_id, bias in p.logit_bias:
        logits[token_id] += bias
    if row.banned:
        logits[sorted(row.banned)] = -torch.inf
    return logits


def _draw(logits: Tensor, row: SamplingRow) -> int:
    """Temperature, then top_k, top_p and min_p on the most probable tokens, then one uniform number."""
    p = row.params
    scaled = logits / p.temperature
    probabilities = torch.softmax(scaled - scaled.max(), dim=-1)
    if p.top_k == 0 and p.top_p >= 1.0 and p.min_p == 0.0:
        ids, kept = None, probabilities
    else:
        ids, kept = _filter(probabilities, p)
    position = len(row.tokens) - row.prompt_len
    cumulative = torch.cumsum(kept.double(), dim=-1)
    target = uniform(p.seed, position) * float(cumulative[-1])
    index = min(int(torch.searchsorted(cumulative, target, right=True)), len(cumulative) - 1)
    return index if ids is None else int(ids[index])


def _filter(probabilities: Tensor, p: SamplingParams) -> tuple[Tensor, Tensor]:
    """Token ids and probabilities that survive, most probable first; at least one does."""
    vocab = len(probabilities)
    count = min(vocab, p.top_k or TOP_CANDIDATES)
    kept, ids = torch.topk(probabilities, count)
    enough = p.top_k > 0 or float(kept.sum()) >= p.top_p or (p.min_p > 0 and kept[-1] < p.min_p * kept[0])
    if not enough:
        kept, ids = torch.sort(probabilities, descending=True, stable=True)
    if p.top_k:
        kept = kept / kept.sum()  # top_p then counts within these
    if p.top_p < 1.0:
        before = torch.cumsum(kept, dim=-1) - kept
        survivors = int((before < p.top_p).sum())
        kept, ids = kept[: max(1, survivors)], ids[: max(1, survivors)]
    if p.min_p > 0.0:
        survivors = max(1, int((kept >= p.min_p * kept[0]).sum()))
        kept, ids = kept[:survivors], ids[:survivors]
    return ids, kept


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox, a counter-based generator)."""
    generator = np.random.Philox(key=seed & (1 << 64) - 1, counter=position)
    return float(generator.random_raw() >> 11) * 2.0**-53
