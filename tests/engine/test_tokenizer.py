"""Tokenizers rebuilt from GGUF metadata and read from folders, against the libraries that define them.

References: a byte-level BPE trained here with the pipelines that the published models use, and
SentencePiece's own encoder. Every comparison runs over the strings of `varied_texts`.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from small_tokenizers import (
    CONTROL_TOKENS,
    finish,
    train_byte_level,
    train_sentencepiece,
    varied_texts,
    write_byte_level_gguf,
    write_sentencepiece_gguf,
)

from penstock.core.errors import InvalidRequest, ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer
from penstock.models.tokenizer_parts import Scheme

TEXTS = varied_texts()


def from_gguf(path: Path) -> Tokenizer:
    return Tokenizer.load(ModelSource("test", "gguf", path, "test"))


def from_folder(path: Path) -> Tokenizer:
    return Tokenizer.load(ModelSource("test", "folder", path, "test"))


def mismatches(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> list[str]:
    return [text for text in TEXTS if ours[text] != theirs[text]]


def test_there_are_enough_strings() -> None:
    assert len(set(TEXTS)) >= 200


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_ids_are_equal_by_every_way(pre: str, tmp_path: Path) -> None:
    reference = train_byte_level(pre)
    reference.save(str(tmp_path / "tokenizer.json"))
    expected = {text: reference.encode(text).ids for text in TEXTS}
    rebuilt = from_gguf(write_byte_level_gguf(reference, pre, tmp_path / "model.gguf"))
    read = from_folder(tmp_path)
    for ours in (rebuilt, read):
        assert ours.scheme is Scheme.BYTE_LEVEL and ours.vocab_size == reference.get_vocab_size()
        assert mismatches({text: ours.encode(text) for text in TEXTS}, expected) == []
        assert [t for t in TEXTS if ours.decode(expected[t]) != reference.decode(expected[t])] == []


@pytest.mark.parametrize("prefix", [True, False], ids=["space-prefix", "no-prefix"])
def test_sentencepiece_ids_are_those_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    import sentencepiece

    model = train_sentencepiece(tmp_path, prefix=prefix)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = from_gguf(write_sentencepiece_gguf(model, tmp_path / "model.gguf", prefix=prefix))
    expected = {text: reference.EncodeAsIds(text) for text in TEXTS}
    assert mismatches({text: ours.encode(text, add_special=False) for text in TEXTS}, expected) == []
    assert [text for text in TEXTS if ours.decode(expected[text]) != text] == []
    assert ours.encode("hi") == [reference.bos_id(), *reference.EncodeAsIds("hi")]
    assert ours.adds_bos and ours.eos_ids == {reference.eos_id()}


def test_sentencepiece_space_is_dropped_once_and_kept_when_text_continues(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, prefix=True)
    ours = from_gguf(write_sentencepiece_gguf(model, tmp_path / "model.gguf", prefix=True))
    ids = ours.encode("the fox", add_special=False)
    assert ours.decode(ids) == "the fox"
    assert ours.decode(ids, continues_text=True) == " the fox"
    assert ours.decode(ours.encode("  two", add_special=False)) == "  two"
    assert ours.decode([ours.bos_id, *ids]) == "the fox"
    assert ours.decode([ours.bos_id, *ids], skip_special=False) == "<s> the fox"


def test_a_sentencepiece_byte_is_a_byte(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, prefix=True)
    ours = from_gguf(write_sentencepiece_gguf(model, tmp_path / "model.gguf", prefix=True))
    rare = "\U0001f9ff"
    ids = ours.encode(rare, add_special=False)
    assert b"".join(ours.token_bytes(i) for i in ids).lstrip() == rare.encode()
    assert max(len(ours.token_bytes(i)) for i in ids) == 1
    assert ours.decode(ids[:-1]).endswith("\ufffd")


def test_a_sentencepiece_model_saved_as_json_decodes_alike(tmp_path: Path) -> None:
    """The `tokenizer.json` form of a SentencePiece model: same ids, same leading-space rule."""
    model = train_sentencepiece(tmp_path, prefix=True)
    rebuilt = from_gguf(write_sentencepiece_gguf(model, tmp_path / "model.gguf", prefix=True))
    backend = rebuilt._parts.backend
    replace, strip = tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Strip(" ", 1, 0)
    steps = [replace, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), strip]
    backend.decoder = tokenizers.decoders.Sequence(steps)
    backend.save(str(tmp_path / "tokenizer.json"))
    read = from_folder(tmp_path)
    assert read.scheme is Scheme.SENTENCEPIECE and read.drops_leading_space
    for text in TEXTS:
        ids = read.encode(text)
        assert ids == rebuilt.encode(text)
        assert read.decode(ids) == rebuilt.decode(ids) == backend.decode(ids) == text


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "model.gguf"
    return from_gguf(write_byte_level_gguf(train_byte_level("smollm"), "smollm", path))


def test_control_text_is_a_token_only_when_parsed(bpe: Tokenizer) -> None:
    text = "<|im_start|>user\nhello<|im_end|>"
    parsed, literal = bpe.encode(text), bpe.encode(text, parse_special=False)
    assert parsed[0] == CONTROL_TOKENS.index("<|im_start|>") and parsed[-1] in bpe.eos_ids
    assert not set(literal) & bpe.special_ids
    assert bpe.decode(literal) == text
    assert bpe.decode(parsed) == "user\nhello"
    assert bpe.decode(parsed, skip_special=False) == text


def test_token_bytes_join_to_the_text(bpe: Tokenizer) -> None:
    for text in TEXTS:
        assert b"".join(bpe.token_bytes(i) for i in bpe.encode(text)) == text.encode()


def test_a_token_that_is_half_a_character(bpe: Tokenizer) -> None:
    ids = bpe.encode("\U0001f9ff")
    assert len(ids) > 1
    assert bpe.token_text(ids[0]) == "\ufffd"
    assert bpe.decode(ids) == "\U0001f9ff"


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff ok", "\udc80"])
def test_lone_surrogates_are_refused_by_name(bpe: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bpe.encode(text, param="messages")
    assert caught.value.param == "messages" and "surrogate" in caught.value.message


def test_ids_outside_the_vocabulary_are_refused_or_empty(bpe: Tokenizer) -> None:
    bpe.check_ids([0, bpe.vocab_size - 1], param="prompt")
    for bad in (-1, bpe.vocab_size, 2**70):
        with pytest.raises(InvalidRequest) as caught:
            bpe.check_ids([0, bad], param="prompt")
        assert caught.value.param == "prompt" and "prompt[1]" in caught.value.message
        assert bpe.token_bytes(bad) == b""
        assert bpe.decode([bad]) == ""


@pytest.mark.model
def test_smollm2_round_trips_and_matches_its_published_pipeline(smollm2: ModelSource) -> None:
    ours = Tokenizer.load(smollm2)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.adds_bos) == (49152, 1, {2}, False)
    assert [text for text in TEXTS if ours.decode(ours.encode(text)) != text] == []
    state = json.loads(ours._parts.backend.to_str())
    published = tokenizers.Tokenizer.from_str(json.dumps(state))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    gpt2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    published.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, gpt2])
    assert [text for text in TEXTS if ours.encode(text) != published.encode(text).ids] == []


@pytest.mark.model
def test_smollm2_known_ids(smollm2: ModelSource) -> None:
    """Fixed points, so that a change of the splitting rule cannot pass unseen."""
    ours = Tokenizer.load(smollm2)
    assert ours.encode("Hello world 1234") == [19556, 905, 216, 33, 34, 35, 36]
    assert ours.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]


def gguf_with(path: Path, **changes: object) -> Path:
    """A tiny valid BPE tokenizer, with fields replaced (or dropped, by None)."""
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "<e>"],
        "token_type": [1, 1, 1, 3],
        "merges": ["a b"],
        "eos_token_id": 3,
        **changes,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    return finish(writer, path)


def test_a_whole_word_is_taken_without_merging_where_the_rule_says_so(tmp_path: Path) -> None:
    words = {"tokens": ["a", "b", "c", "abc"], "token_type": [1] * 4, "merges": []}
    plain = from_gguf(gguf_with(tmp_path / "plain.gguf", **words, pre="gpt-2"))
    whole = from_gguf(gguf_with(tmp_path / "whole.gguf", **words, pre="llama-bpe", add_bos_token=False))
    assert (plain.encode("abc"), whole.encode("abc")) == ([0, 1, 2], [3])


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        ("default", "12345 a+b", ["123", "45", "Ġa", "+", "b"]),
        ("tekken", "fooBar HTTPServer x12", ["foo", "Bar", "ĠHTTPServer", "Ġx", "1", "2"]),
        ("starcoder", "x12 it's", ["x", "1", "2", "Ġit", "'s"]),
    ],
)
def test_rules_without_a_published_pipeline_here_cut_as_described(
    pre: str, text: str, cuts: list[str], tmp_path: Path
) -> None:
    backend = from_gguf(gguf_with(tmp_path / "m.gguf", pre=pre))._parts.backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == cuts


def test_the_first_of_two_equal_tokens_encodes_and_both_decode(tmp_path: Path) -> None:
    tokens = {"tokens": ["a", "b", "a", "<e>"], "merges": []}
    tokenizer = from_gguf(gguf_with(tmp_path / "m.gguf", **tokens))
    assert tokenizer.encode("aa") == [0, 0] and tokenizer.decode([0, 2]) == "aa"


def test_an_added_token_is_its_text_not_its_letters_bytes(tmp_path: Path) -> None:
    """`é` alone is byte E9 in a byte-level vocabulary, but in an added token it is the letter."""
    tokens = {"tokens": ["a", "b", "<é>", "<e>"], "token_type": [1, 1, 4, 3], "merges": []}
    tokenizer = from_gguf(gguf_with(tmp_path / "m.gguf", **tokens))
    assert tokenizer.encode("a<é>") == [0, 2] and tokenizer.decode([0, 2]) == "a<é>"


SPM = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "▁", "<", "s", ">", "<s", "    "],
    "token_type": [2, 3, 3, 1, 1, 1, 1, 1, 4],
    "scores": [0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -7.0, -1.0, 0.0],
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_spelt_out_control_text_never_merges_into_the_control_token(tmp_path: Path) -> None:
    tokenizer = from_gguf(gguf_with(tmp_path / "m.gguf", **SPM))
    assert tokenizer.encode("<s>", parse_special=False) == [1, 3, 7, 6]
    assert tokenizer.encode("<s>", parse_special=False, add_special=False) == [3, 7, 6]
    assert tokenizer.encode("<s>", add_special=False) == [1]


def test_user_defined_runs_of_spaces_are_matched_as_they_stand(tmp_path: Path) -> None:
    """Gemma's files have them, written with real spaces."""
    tokenizer = from_gguf(gguf_with(tmp_path / "m.gguf", **SPM, add_bos_token=False, add_space_prefix=False))
    assert tokenizer.encode("s    s ") == [5, 8, 5, 3]
    assert tokenizer.decode([5, 8, 5, 3]) == "s    s "


def test_scores_rank_the_pieces_not_their_ids(tmp_path: Path) -> None:
    """The same SentencePiece model with its vocabulary in reverse order cuts text in the same pieces."""
    import sentencepiece

    model = train_sentencepiece(tmp_path, prefix=True)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    path = write_sentencepiece_gguf(model, tmp_path / "model.gguf", prefix=True, reverse=True)
    ours = from_gguf(path)
    texts = ours._parts.texts
    for text in TEXTS:
        pieces = [texts[i] for i in ours.encode(text, add_special=False)]
        assert pieces == reference.EncodeAsPieces(text)


def test_the_tiny_tokenizer_is_valid_before_it_is_broken(tmp_path: Path) -> None:
    tokenizer = from_gguf(gguf_with(tmp_path / "model.gguf"))
    assert tokenizer.encode("abba<e>") == [2, 1, 0, 3]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"tokens": "a"}, "tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges"),
        ({"merges": ["a z"]}, "do not fit together"),
        ({"eos_token_id": 4}, "tokenizer.ggml.eos_token_id"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0, 0.0, float("nan"), 0.0]}, "tokenizer.ggml.scores"),
        (
            {
                "model": "llama",
                "tokens": ["a" * 500, "b"],
                "token_type": [1, 1],
                "scores": [0.0, 0.0],
                "eos_token_id": 1,
            },
            "pieces under",
        ),
        ({"model": None}, "tokenizer.ggml.model"),
    ],
)
def test_damaged_metadata_is_named(changes: dict[str, object], field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileDamaged) as caught:
        from_gguf(gguf_with(tmp_path / "model.gguf", **changes))
    assert field in caught.value.message and "model.gguf" in caught.value.message


@pytest.mark.parametrize(("key", "value"), [("model", "rwkv"), ("pre", "klingon")])
def test_what_is_not_read_is_named(key: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported) as caught:
        from_gguf(gguf_with(tmp_path / "model.gguf", **{key: value}))
    assert value in caught.value.message and caught.value.hint


@pytest.mark.parametrize("text", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_an_end_of_turn_token_ends_even_if_the_file_forgot_it(text: str, tmp_path: Path) -> None:
    tokens = ["a", "b", "<e>", text]
    path = gguf_with(tmp_path / "m.gguf", tokens=tokens, token_type=[1, 1, 3, 3], merges=[], eos_token_id=2)
    assert from_gguf(path).eos_ids == {2, 3}


def test_a_folder_names_its_ends_in_several_places(tmp_path: Path) -> None:
    train_byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|begin|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = from_folder(tmp_path)
    assert tokenizer.eos_ids == {1, 2, 3} and tokenizer.bos_id == 0
    (tmp_path / "generation_config.json").unlink()
    assert from_folder(tmp_path).eos_ids == {0, 2}


def test_truncation_and_padding_of_a_training_run_are_dropped(tmp_path: Path) -> None:
    tokenizer = train_byte_level("gpt-2")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (
        from_folder(tmp_path).decode(from_folder(tmp_path).encode("many words are here"))
        == "many words are here"
    )


def test_a_folder_without_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelNotAvailable, match=r"tokenizer\.json"):
        from_folder(tmp_path)
    for content in ("", "{}", "[" * 100_000, '{"model": {"type": "BPE"}}', "\ud83c"):
        (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(ModelFileDamaged, match=r"tokenizer\.json"):
            from_folder(tmp_path)


def test_a_decoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    tokenizer = train_byte_level("gpt-2")
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelUnsupported, match="WordPiece"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        # Without our check this one ends the process: the library slices inside a character.
        ("continuing_subword_prefix", "\0", ModelUnsupported),
        ("end_of_word_suffix", "</w>", ModelUnsupported),
        ("dropout", 0.5, ModelUnsupported),
        ("type", "Unigram", ModelUnsupported),
        ("vocab", {"a": -1}, ModelFileDamaged),
        ("merges", [["no", "such"]], ModelFileDamaged),
    ],
)
def test_a_model_part_that_is_not_sound(
    field: str, value: object, error: type[Exception], tmp_path: Path
) -> None:
    state = json.loads(train_byte_level("gpt-2").to_str())
    state["model"][field] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(error, match=r"tokenizer\.json"):
        from_folder(tmp_path)


def test_a_contradiction_that_shows_only_while_encoding(tmp_path: Path) -> None:
    state = json.loads(train_byte_level("gpt-2").to_str())
    state["model"]["unk_token"] = "<not there>"
    state["model"]["vocab"].pop("z")
    state["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelFileDamaged, match="cannot encode"):
        from_folder(tmp_path).encode("zzz")


def test_ids_without_bound_are_refused(tmp_path: Path) -> None:
    train_byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["vocab"]["zzz"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelFileDamaged, match="4000000000"):
        from_folder(tmp_path)
