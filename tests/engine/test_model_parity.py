"""The decoder's logits agree with transformers, for every architecture, in float32 and however it is fed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from stepping import Files, load, logits_in_chunks, random_tokens, relative_error
from tiny_models import TINY, VOCAB
from torch import Tensor

from penstock.engine.model import DecoderModel

PROMPT_TOKENS = 41
TOLERANCE = 1e-4
CHUNKINGS = {"one-shot": [41], "chunks": [1, 13, 2, 17, 8], "decode": [1] * 41}


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
    tokens = random_tokens(PROMPT_TOKENS, VOCAB)
    with torch.no_grad():
        expected = reference(tokens[None], use_cache=False).logits[0]
    return Pair(load(Files(folder)), tokens, expected)


@pytest.mark.parametrize("chunks", CHUNKINGS.values(), ids=CHUNKINGS)
def test_logits_agree_with_transformers(pair: Pair, chunks: list[int]) -> None:
    logits = logits_in_chunks(pair.model, pair.tokens, chunks)
    assert logits.dtype == torch.float32
    assert relative_error(logits, pair.expected) < TOLERANCE


def test_parameters_are_counted_as_transformers_counts_them(
    pair: Pair, request: pytest.FixtureRequest
) -> None:
    case = TINY[request.node.callspec.params["pair"]]
    assert pair.model.config.parameter_count() == case.build().num_parameters()
    # float32 and the plain backend: every parameter once, whether the head is tied or not.
    assert pair.model.weight_bytes >= 4 * pair.model.config.parameter_count()
    assert pair.model.weight_bytes < 4.1 * pair.model.config.parameter_count()


@pytest.mark.parametrize("name", ["llama-tied-sharded", "qwen3", "gemma3", "gemma2"])
def test_bfloat16_rounds_where_transformers_rounds(name: str, tmp_path: object) -> None:
    """With one token there is no sum over keys, so only roundings of our own could make a difference."""
    case = TINY[name]
    reference = case.build().to(torch.bfloat16)
    folder = Files(tmp_path)  # type: ignore[arg-type]
    case.save(reference, folder.path)
    model = load(folder, torch.bfloat16)
    token = torch.tensor([11])
    with torch.no_grad():
        expected = reference.model(token[None], use_cache=False).last_hidden_state[0]
    hidden = model.run(range(model.config.layers), model.embed(token), torch.tensor([0]), _Values())
    assert torch.equal(model._final_norm(hidden), expected)


class _Values:
    """Attention over a single token: its own values, whatever the scores."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
