"""Feeding a model by hand: load from files, run a sequence in chunks with the reference attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from reference_attention import ReferenceAttention
from torch import Tensor

from penstock.engine.checkpoint import open_checkpoint
from penstock.engine.linear import LinearBackend, PlainLinearBackend
from penstock.engine.model import DecoderModel


@dataclass(frozen=True)
class Files:
    """What the engine takes for a model's files."""

    path: Path
    kind: str = "folder"


def load(
    files: Files, dtype: torch.dtype = torch.float32, linear: LinearBackend | None = None
) -> DecoderModel:
    return DecoderModel.load(
        open_checkpoint(files),
        dtype=dtype,
        device=torch.device("cpu"),
        linear=linear or PlainLinearBackend(),
    )


def logits_in_chunks(model: DecoderModel, tokens: Tensor, chunks: list[int]) -> Tensor:
    """float32[len(tokens), vocab]; the chunks add up to the tokens."""
    attention = ReferenceAttention(model.config)
    positions = torch.arange(len(tokens))
    parts = []
    for part, part_positions in zip(tokens.split(chunks), positions.split(chunks), strict=True):
        hidden = model.embed(part)
        hidden = model.run(range(model.config.layers), hidden, part_positions, attention)
        parts.append(model.logits(hidden))
    return torch.cat(parts)


def random_tokens(count: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(3))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())
