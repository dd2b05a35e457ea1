"""A row's result does not depend on the other rows of the call, bit for bit (DESIGN law 8).

GEMMs are the linear backend's duty, so here each row is multiplied by itself. Attention is left out for the
same reason: every row attends to its own values only. What remains is the model's own arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stepping import Files, load
from tiny_models import TINY, VOCAB
from torch import Tensor

from penstock.engine.model import DecoderModel

ROWS = 23


class _RowByRow:
    """A linear that never sees two rows at once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(row, self._weight, self._bias) for row in x.split(1)])


class _RowByRowBackend:
    name = "row-by-row"

    def pack(self, weight: Tensor, bias: Tensor | None) -> _RowByRow:
        return _RowByRow(weight, bias)


class _OwnValues:
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        shares = (q * k.repeat_interleave(group, dim=1)).sum(-1, keepdim=True).sigmoid()
        return shares * v.repeat_interleave(group, dim=1)


@pytest.fixture(scope="module", params=["llama-yarn", "qwen3", "gemma3", "mixtral", "qwen3-moe-norm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    case = TINY[request.param]
    folder = tmp_path_factory.mktemp("tiny")
    case.save(case.build(), folder)
    return load(Files(folder), torch.bfloat16, _RowByRowBackend())


def _logits(model: DecoderModel, tokens: Tensor, positions: Tensor) -> Tensor:
    hidden = model.run(range(model.config.layers), model.embed(tokens), positions, _OwnValues())
    return model.logits(hidden)


def test_any_subset_of_rows_gives_the_same_logits(model: DecoderModel) -> None:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    positions = torch.randint(0, model.config.context_len, (ROWS,), generator=generator)
    whole = _logits(model, tokens, positions)
    for count in (1, 2, 3, 8, 15, 22):
        rows = torch.randperm(ROWS, generator=generator)[:count]
        assert torch.equal(_logits(model, tokens[rows], positions[rows]), whole[rows])


def test_layers_run_in_parts_as_in_one(model: DecoderModel) -> None:
    tokens, positions = torch.arange(5), torch.tensor([0, 3, 1, 200, 7])
    hidden = model.embed(tokens)
    before = hidden.clone()
    whole = model.run(range(model.config.layers), hidden, positions, _OwnValues())
    assert torch.equal(hidden, before), "the caller's rows are left alone"
    first = model.run(range(0, 2), hidden, positions, _OwnValues())
    rest = model.run(range(2, model.config.layers), first, positions, _OwnValues())
    assert torch.equal(rest, whole)


def test_positions_keep_their_angles_when_the_tables_grow(tmp_path: Path) -> None:
    """Asked in any order, in small steps, or reserved at once: the same logits."""
    case = TINY["llama-llama3"]
    long = type(case)(case.config, case.changes | {"max_position_embeddings": 5000})
    long.save(long.build(), tmp_path)
    tokens, positions = torch.arange(6), torch.tensor([0, 1023, 1024, 2047, 3000, 4999])
    reserved, grown = load(Files(tmp_path)), load(Files(tmp_path))
    reserved.reserve_positions(5000)
    whole = _logits(reserved, tokens, positions)
    for row in range(6):
        part = slice(row, row + 1)
        single = _logits(reserved, tokens[part], positions[part])
        assert torch.equal(_logits(grown, tokens[part], positions[part]), single)
    assert torch.allclose(_logits(grown, tokens, positions), whole)
