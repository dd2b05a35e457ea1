"""Small tokenizers trained on the spot, as models ship them: `tokenizer.json`, GGUF, SentencePiece."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import gguf
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

CONTROL_TOKENS = ("<|begin|>", "<|im_start|>", "<|im_end|>", "<|tool|>")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, twice, at 12:34:56 on 2024-01-31.",
    "Schöne Grüße aus Köln – straßenweit über Öl und Äpfel.",
    "El niño comió piñata y bebió café en la mañana.",
    "Привет, мир! Как твои дела сегодня?",
    "你好，世界。今天的天气很好。",
    "こんにちは世界、今日はいい天気ですね。",
    "مرحبا بالعالم",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "안녕하세요 세계",
    "🎉 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ emoji with joiners and tones",
    "I'm sure they'll say we've DON'T'VE it's they'RE",
    "x = {'a': [1, 2, 3], \"b\": None}  # comment",
    "def f(x):\n    if x > 0:\n        return x ** 2\n\n\n    return None\n",
    "tabs\tand\t\ttabs, carriage\r\nreturns\r\n\r\n and   runs    of     spaces      ",
    "3.14159 1,000,000 0xDEADBEEF 1e-9 ½ ² Ⅷ ٣",
    "https://example.org/path?query=value&other=%20#fragment",
    "e\u0301 is not é until it is composed; ﬁ ligature; Å vs Å",
    "\x00 NUL, \x1b escape, \u200b zero width, \ufeff mark, \u202e override",
)


def training_text() -> list[str]:
    """Prose in many scripts and a good deal of code, the same on every machine of one Python version."""
    return [
        *SENTENCES * 20,
        *inspect.getsource(argparse).splitlines(),
        *inspect.getsource(textwrap).splitlines(),
    ]


def varied_texts() -> list[str]:
    """Over 200 strings that tokenizers get wrong: scripts, runs, edges, mixtures."""
    pieces = ["a", " ", "  ", "\n", "\t", "9", "é", "你", "🎉", "'s", "_", "-", "\r\n", "A", "."]
    pairs = [left + right for left in pieces for right in pieces]
    runs = [unit * count for unit in (" ", "\n", "ab", "7", "🎉", " x") for count in (1, 2, 3, 7, 30)]
    edges = ["", *(" " + sentence + " " for sentence in SENTENCES)]
    return [*SENTENCES, *pairs, *runs, *edges]


def split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    """As the published `tokenizer.json` files of Llama 3 and Qwen 2 are built."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def published_pipeline(pre: str) -> tuple[pre_tokenizers.PreTokenizer, bool, bool]:
    """The splitting that `pre` stands for as its own models publish it, ignore_merges, and NFC."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": (gpt2, False, False),
        "smollm": (pre_tokenizers.Sequence([digits, gpt2]), False, False),
        "llama-bpe": (split_then_bytes(LLAMA3_PATTERN), True, False),
        "qwen2": (split_then_bytes(QWEN2_PATTERN), False, True),
    }[pre]


def train_byte_level(pre: str, vocab_size: int = 900) -> tokenizers.Tokenizer:
    """A byte-level BPE with the four control tokens as its first ids."""
    splitting, ignore_merges, composes = published_pipeline(pre)
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.ByteLevel()
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return tokenizer


def write_byte_level_gguf(tokenizer: tokenizers.Tokenizer, pre: str, path: Path) -> Path:
    """The same vocabulary and merges as llama.cpp's converter would store them."""
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    texts = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types([3 if text in CONTROL_TOKENS else 1 for text in texts])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    return finish(writer, path)


def train_sentencepiece(folder: Path, *, prefix: bool) -> bytes:
    """A serialised SentencePiece BPE model like Llama's: byte fallback, no normalisation."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(line for line in training_text() if "\x00" not in line), encoding="utf-8")
    model_prefix = folder / "spm"
    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus),
        model_prefix=str(model_prefix),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        minloglevel=2,
    )
    return model_prefix.with_suffix(".model").read_bytes()


def write_sentencepiece_gguf(model: bytes, path: Path, *, prefix: bool, reverse: bool = False) -> Path:
    """The model's pieces, scores and kinds; `reverse` gives its last piece the first id."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.GetPieceSize())[:: -1 if reverse else 1]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.IdToPiece(i) for i in ids])
    writer.add_token_scores([processor.GetScore(i) for i in ids])
    writer.add_token_types([_kind(processor, i) for i in ids])
    writer.add_bos_token_id(ids.index(processor.bos_id()))
    writer.add_eos_token_id(ids.index(processor.eos_id()))
    writer.add_add_space_prefix(prefix)
    return finish(writer, path)


def _kind(processor: object, token_id: int) -> int:
    for name, kind in (("IsUnknown", 2), ("IsControl", 3), ("IsByte", 6), ("IsUnused", 5)):
        if getattr(processor, name)(token_id):
            return kind
    return 1


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
