"""Detokenising a token at a time equals decoding all at once, cut at the first stop string.

The reference is written the slow and obvious way, on the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    train_byte_level,
    train_sentencepiece,
    write_byte_level_gguf,
    write_sentencepiece_gguf,
)

from penstock.core.errors import InvalidRequest
from penstock.models.detokenize import MAX_STOP_CHARACTERS, IncrementalDetokenizer, StopMatcher
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "model.gguf"
    write_byte_level_gguf(train_byte_level("smollm"), "smollm", path)
    return Tokenizer.load(ModelSource("test", "gguf", path, "test"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("spm")
    path = write_sentencepiece_gguf(
        train_sentencepiece(folder, prefix=True), folder / "model.gguf", prefix=True
    )
    return Tokenizer.load(ModelSource("test", "gguf", path, "test"))


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: ModelSource) -> Tokenizer:
    return Tokenizer.load(smollm2)


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Where the first completed stop string ends, and which: the longest of those that end there."""
    for end in range(1, len(text) + 1):
        complete = [candidate for candidate in stop if text[:end].endswith(candidate)]
        if complete:
            return end, max(complete, key=len)
    return None


def expected(text: str, stop: Sequence[str], include_stop: bool) -> tuple[str, str | None]:
    found = first_stop(text, stop)
    if found is None:
        return text, None
    end, which = found
    return text[: end if include_stop else end - len(which)], which


def drawn_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Any ids, control tokens and ones beyond the vocabulary included, mixed with tokens of real text."""
    any_id = st.integers(0, tokenizer.vocab_size + 2)
    words = st.sampled_from(["the fox", " 🎉👍🏽", "naïve", "  \n", "日本", "<|im_end|>", "</s>"])
    real = words.map(lambda text: tokenizer.encode(text))
    return [i for part in data.draw(st.lists(any_id.map(lambda i: [i]) | real, max_size=40)) for i in part]


def drawn_stops(data: st.DataObject, text: str) -> list[str]:
    """Slices of the very text, so that they match and span tokens, and near misses of such slices."""
    if not text:
        return data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))
    start = st.integers(0, len(text) - 1)
    piece = st.tuples(start, st.integers(1, 9)).map(lambda cut: text[cut[0] : cut[0] + cut[1]])
    near_miss = piece.map(lambda stop: stop + "x")
    return data.draw(st.lists(piece | near_miss | st.text(min_size=1, max_size=2), max_size=4))


def check(data: st.DataObject, tokenizer: Tokenizer) -> None:
    ids = drawn_ids(data, tokenizer)
    skip, include, continues = (data.draw(st.booleans()) for _ in range(3))
    text = tokenizer.decode(ids, skip_special=skip, continues_text=continues)
    stop = drawn_stops(data, text)
    machine = IncrementalDetokenizer(
        tokenizer, stop=stop, skip_special=skip, include_stop=include, continues_text=continues
    )
    pieces = []
    for token_id in ids:
        pieces.append(machine.push(token_id))
        so_far = "".join(pieces)
        # Nothing is ever returned that has to be taken back.
        assert expected(text, stop, include)[0].startswith(so_far)
    pieces.append(machine.finish())
    assert ("".join(pieces), machine.stopped_by) == expected(text, stop, include)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decoded_text(data: st.DataObject, tokenizer: Tokenizer) -> None:
    check(data, tokenizer)


@pytest.mark.model
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_over_the_vocabulary_of_smollm2(
    data: st.DataObject, smollm2_tokenizer: Tokenizer
) -> None:
    check(data, smollm2_tokenizer)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=40),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5),
)
def test_the_matcher_holds_back_exactly_what_could_still_stop(text: str, stop: list[str]) -> None:
    """Two letters only, so that stop strings overlap themselves and each other all the time."""
    matcher = StopMatcher(stop)
    found = first_stop(text, stop)
    end = matcher.feed(text)
    assert (end, matcher.matched) == (found or (None, None))
    if found is None:
        begun = [n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) for s in stop)]
        assert matcher.begun == max(begun)


def test_a_character_is_never_split(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("\U0001f9ff!")
    machine = IncrementalDetokenizer(byte_level)
    assert [machine.push(i) for i in ids] == [""] * (len(ids) - 2) + ["\U0001f9ff", "!"]


def test_an_unfinished_character_is_flushed_as_decode_would(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a\U0001f9ff")[:-1]
    machine = IncrementalDetokenizer(byte_level)
    assert "".join(machine.push(i) for i in ids) == "a"
    assert machine.finish() == "\ufffd"


def test_text_is_released_as_soon_as_it_cannot_stop(byte_level: Tokenizer) -> None:
    machine = IncrementalDetokenizer(byte_level, stop=["\n\nUser:"])
    pieces = ["".join(machine.push(i) for i in byte_level.encode(text)) for text in ("ok", "\n", "\n", "Z")]
    assert pieces == ["ok", "", "", "\n\nZ"]


def test_after_the_stop_nothing_comes_any_more(byte_level: Tokenizer) -> None:
    machine = IncrementalDetokenizer(byte_level, stop=["END", "NEVER"])
    text = "".join(machine.push(i) for i in byte_level.encode("so END and more END"))
    assert (text, machine.stopped_by, machine.finish()) == ("so ", "END", "")


@pytest.mark.parametrize("stop", [[""], ["ok", ""], ["x" * (MAX_STOP_CHARACTERS + 1)], ["ab"] * 100_000])
def test_useless_stop_strings_are_refused(byte_level: Tokenizer, stop: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        IncrementalDetokenizer(byte_level, stop=stop)
    assert caught.value.param == "stop"


def test_work_does_not_grow_with_the_text(byte_level: Tokenizer) -> None:
    """The worst case for naive matching: a long self-similar stop string that never completes.

    Counted in automaton steps, not in time: at most two a character, amortised.
    """

    class Counting(StopMatcher):
        lookups = 0

        def _step(self, node: int, character: str) -> int:
            while node and (node, character) not in self._children:
                Counting.lookups += 1
                node = self._fallback[node]
            Counting.lookups += 1
            return self._children.get((node, character), 0)

    matcher = Counting(["a" * 5000 + "b"])
    Counting.lookups = 0
    text = ("a" * 4999 + "c") * 20
    assert matcher.feed(text) is None
    assert Counting.lookups <= 2 * len(text)


@pytest.mark.parametrize("again", ["push", "finish"])
def test_use_after_finish_is_our_bug(byte_level: Tokenizer, again: str) -> None:
    machine = IncrementalDetokenizer(byte_level)
    machine.finish()
    with pytest.raises(AssertionError):
        machine.push(1) if again == "push" else machine.finish()
