"""The decoder's logits agree with transformers, for every architecture, in float32 and however it is fed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from reference_attention import ReferenceAttention
from tiny_models import TINY, VOCAB
from torch import Tensor

from penstock.engine.checkpoint import open_checkpoint
from penstock.engine.linear import PlainLinearBackend
from penstock.engine.model import DecoderModel

PROMPT_TOKENS = 41
TOLERANCE = 1e-4
CHUNKINGS = {"one-shot": [41], "chunks": [1, 13, 2, 17, 8], "decode": [1] * 41}


@dataclass(frozen=True)
class Folder:
    """What the engine takes for a model's files."""

    path: Path
    kind: str = "folder"


@dataclass(frozen=True)
class Pair:
    """Our model beside the logits that transformers gives for `tokens`."""

    model: DecoderModel
    tokens: Tensor
    expected: Tensor


@pytest.fixture(scope="module", params=TINY, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = TINY[request.param]
    reference = case.build()
    folder = tmp_path_factory.mktemp("tiny")
    case.save(reference, folder)
    tokens = torch.randint(0, VOCAB, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference(tokens[None], use_cache=False).logits[0]
    return Pair(load(folder), tokens, expected)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DecoderModel:
    checkpoint = open_checkpoint(Folder(folder))
    return DecoderModel.load(checkpoint, dtype=dtype, device=torch.device("cpu"), linear=PlainLinearBackend())


def logits_in_chunks(model: DecoderModel, tokens: Tensor, chunks: list[int]) -> Tensor:
    attention = ReferenceAttention(model.config)
    positions = torch.arange(len(tokens))
    parts = []
    for part, part_positions in zip(tokens.split(chunks), positions.split(chunks), strict=True):
        hidden = model.embed(part)
        hidden = model.run(range(model.config.layers), hidden, part_positions, attention)
        parts.append(model.logits(hidden))
    return torch.cat(parts)


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_logits_agree_with_transformers(pair: Pair, chunks: list[int]) -> None:
    logits = logits_in_chunks(pair.model, pair.tokens, chunks)
    assert logits.dtype == torch.float32
    error = (logits - pair.expected).abs().max() / pair.expected.abs().max()
    assert error < TOLERANCE
