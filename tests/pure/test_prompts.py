"""Prompts: exact lengths, shared prefixes where the trace shares them, the same for the same seed."""

from __future__ import annotations

import pytest

from penstock.core.errors import ConfigError
from penstock.workloads.prompts import COMMON_WORDS, LEADING_WORD, PromptMaker, TextFit, TokenRange
from penstock.workloads.trace import TraceRow

FIT = TextFit(COMMON_WORDS, overhead_tokens=3, is_exact=True)


def blocks(prompt_tokens: int, *hashes: int) -> TraceRow:
    return TraceRow(0.0, prompt_tokens, 1, block_hashes=hashes, block_tokens=16)


def turn(prompt_tokens: int, session_id: str = "s") -> TraceRow:
    return TraceRow(0.0, prompt_tokens, 1, session_id=session_id)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 1000])
def test_lengths_are_exact_and_ids_in_range(length: int) -> None:
    ids = PromptMaker(1, TokenRange(100, 200)).token_ids(0, TraceRow(0.0, length, 1))
    assert len(ids) == length
    assert all(100 <= token < 200 for token in ids)


def test_same_seed_same_prompts_other_seed_others() -> None:
    rows = [TraceRow(0.0, 20, 1), blocks(20, 5, 6), turn(20), turn(30)]

    def all_ids(seed: int) -> list[list[int]]:
        maker = PromptMaker(seed)
        return [maker.token_ids(index, row) for index, row in enumerate(rows)]

    assert all_ids(7) == all_ids(7)
    assert not any(one == other for one, other in zip(all_ids(7), all_ids(8), strict=True))


def test_unrelated_rows_share_nothing() -> None:
    maker = PromptMaker(0)
    first, second = (maker.token_ids(index, TraceRow(0.0, 64, 1)) for index in range(2))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 4


def test_equal_block_ids_are_equal_tokens() -> None:
    maker = PromptMaker(0)
    first, second = maker.token_ids(0, blocks(40, 1, 2, 3)), maker.token_ids(1, blocks(48, 1, 2, 4))
    assert first[:32] == second[:32]
    assert first[32:] != second[32:40]
    partial = maker.token_ids(2, blocks(20, 1, 2))
    assert partial == first[:20], "a partial block is the beginning of the whole one"


def test_a_longer_turn_extends_the_one_before() -> None:
    maker = PromptMaker(0)
    first, second, other = (
        maker.token_ids(index, row) for index, row in enumerate((turn(20), turn(35), turn(35, "t")))
    )
    assert second[:20] == first
    assert other[:20] != first
    third, fourth = maker.token_ids(3, turn(10)), maker.token_ids(4, turn(40))
    assert third != first[:10], "a turn that does not grow is new content"
    assert fourth[:10] == third


def test_asking_twice_for_one_row_changes_nothing() -> None:
    maker = PromptMaker(0)
    assert maker.token_ids(0, turn(20)) == maker.token_ids(0, turn(20))


def test_text_has_a_word_a_token_and_shares_prefixes() -> None:
    maker = PromptMaker(0)
    text = maker.text(0, blocks(40, 1, 2, 3), FIT).split(" ")
    assert len(text) == 40 - 3
    assert text[0] == LEADING_WORD and set(text) <= set(COMMON_WORDS)
    longer = maker.text(1, blocks(48, 1, 2, 4), FIT).split(" ")
    assert longer[:29] == text[:29]
    assert maker.text(2, TraceRow(0.0, 1, 1), FIT) == LEADING_WORD


def test_words_are_distinct() -> None:
    assert len(set(COMMON_WORDS)) == len(COMMON_WORDS) > 300


@pytest.mark.parametrize(
    ("vocab", "expected"),
    [(None, TokenRange(1000, 31_000)), (49_152, TokenRange()), (512, TokenRange(128, 512))],
)
def test_token_range_of_a_vocabulary(vocab: int | None, expected: TokenRange) -> None:
    assert TokenRange.of_vocabulary(vocab) == expected


def test_a_tiny_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        TokenRange.of_vocabulary(3)
