"""Sampling: the right distribution, the right filters, and nothing that depends on the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from penstock.core.request import SamplingParams
from penstock.engine.sampling import SamplingRow, sample, token_logprobs, uniform

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.08, 0.02]))


def row(
    params: SamplingParams, output: tuple[int, ...] = (), banned: frozenset[int] = frozenset()
) -> SamplingRow:
    return SamplingRow(params, [0, *output], 1, banned)


def draws(params: SamplingParams, logits: torch.Tensor = LOGITS, count: int = 4000) -> list[float]:
    """Frequencies of each token over `count` seeds."""
    rows = [row(replace(params, seed=seed)) for seed in range(count)]
    tokens = sample(logits.expand(count, -1).contiguous(), rows)
    return [tokens.count(token) / count for token in range(logits.shape[-1])]


def assert_frequencies(found: list[float], expected: list[float]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) <= 5 * math.sqrt(max(other * (1 - other), 1e-4) / 4000)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.4, 0.3, 0.2, 0.08, 0.02]),
        (SamplingParams(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=0.69), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (SamplingParams(min_p=0.45), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (SamplingParams(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=1e-9), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=0.5), [x / 0.2968 for x in (0.16, 0.09, 0.04, 0.0064, 0.0004)]),
        (
            SamplingParams(logit_bias=((4, math.log(20)),)),
            [0.4 / 1.38, 0.3 / 1.38, 0.2 / 1.38, 0.08 / 1.38, 0.4 / 1.38],
        ),
    ],
)
def test_frequencies(params: SamplingParams, expected: list[float]) -> None:
    assert_frequencies(draws(params), expected)


def test_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    vocab = 5000
    logits = torch.zeros(vocab)
    tokens = sample(
        logits.expand(200, -1), [row(SamplingParams(top_p=0.99, seed=seed)) for seed in range(200)]
    )
    assert len(set(tokens)) > 150 and max(tokens) > 2000


def test_penalties_change_what_was_said() -> None:
    said = (0, 0, 1)
    greedy = SamplingParams(temperature=0.0)
    assert sample(LOGITS[None], [row(greedy, said)]) == [0]
    assert sample(LOGITS[None], [row(replace(greedy, frequency_penalty=2.0), said)]) == [2]
    assert sample(LOGITS[None], [row(replace(greedy, presence_penalty=1.0), said)]) == [2]
    positive = LOGITS + 5
    assert sample(positive[None], [row(replace(greedy, repetition_penalty=1.5), said)]) == [2]


def test_banned_tokens_are_never_drawn() -> None:
    banned = frozenset({0, 1})
    rows = [row(SamplingParams(seed=seed), banned=banned) for seed in range(300)]
    assert set(sample(LOGITS.expand(300, -1), rows)) <= {2, 3, 4}
    assert sample(LOGITS[None], [row(SamplingParams(temperature=0.0), banned=banned)]) == [2]


def test_a_draw_depends_on_seed_and_position_only() -> None:
    params = SamplingParams(seed=9)
    alone = sample(LOGITS[None], [row(params, (1, 2))])
    others = [row(SamplingParams(seed=i)) for i in range(20)]
    assert sample(LOGITS.expand(21, -1), [*others, row(params, (1, 2))])[-1:] == alone
    assert len({uniform(9, position) for position in range(100)}) == 100
    assert uniform(1, 0) != uniform(2, 0)


def test_logits_are_left_alone() -> None:
    logits = LOGITS.clone()
    sample(logits[None], [row(SamplingParams(repetition_penalty=2.0, temperature=0.3, top_p=0.5), (0,))])
    assert torch.equal(logits, LOGITS)


def test_logprobs_are_those_of_the_model() -> None:
    scored = token_logprobs(LOGITS * 1.0, 2, 3)
    assert scored.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in scored.top] == [0, 1, 2]
    assert scored.top[0][1] == pytest.approx(math.log(0.4), abs=1e-6)
    assert token_logprobs(LOGITS, 0, 0).top == ()
