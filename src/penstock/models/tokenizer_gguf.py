"""Rebuilding a tokenizer from the metadata of a GGUF file.

GGUF stores a vocabulary, merges or scores, and the name of a splitting rule, not a pipeline. The rules
below are those that llama.cpp attaches to the names (`llm_tokenizer_bpe` in `src/llama-vocab.cpp`), which
in turn are those of each model's own `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from penstock.core.errors import ModelFileDamaged
from penstock.models.fields import Fields
from penstock.models.tokenizer_parts import MAX_VOCABULARY, Scheme, TokenizerParts

if TYPE_CHECKING:
    import tokenizers

MAX_MERGES: Final = 2 * MAX_VOCABULARY
MAX_PIECE_CHARACTERS: Final = 256
"""Longest SentencePiece piece that may be merged: bounds the search for its merges."""

SPACE_MARK: Final = "▁"

# The four families of splitting patterns. `isolated` below applies each in turn to what the former left.
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut before merging: patterns applied in turn, each match isolated."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A whole word that is in the vocabulary is taken without merging."""
    adds_bos: bool = False
    """When the file does not say."""
    composes: bool = False
    """Text is brought to Unicode NFC first."""


_PLAIN: Final = _Splitting((_GPT2,))
_DIGITS_APART: Final = _Splitting((r"\p{N}", _GPT2))
_LLAMA3_RULE: Final = _Splitting((_LLAMA3,), ignore_merges=True, adds_bos=True)
_QWEN2_RULE: Final = _Splitting((_QWEN2,), composes=True)

SPLITTINGS: Final[Mapping[str, _Splitting]] = {
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "mpt": _PLAIN,
    "olmo": _PLAIN,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "command-r": _DIGITS_APART,
    "codeshell": _DIGITS_APART,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "tekken": _Splitting((_TEKKEN,), ignore_merges=True, adds_bos=True),
}

END_OF_TURN_TEXTS: Final = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>"})
"""Control tokens that end an answer, for files that name only the end of the text."""


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def parts_from_gguf(metadata: Mapping[str, object], where: str) -> TokenizerParts:
    """Builds the tokenizer that a GGUF file describes. `where` names the file in errors.

    Raises `ModelFileDamaged`, or `ModelUnsupported` for a tokenizer model or splitting rule not read.
    """
    fields = Fields(metadata, where)
    model = fields.text("tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level_parts(fields, _Vocabulary.read(fields))
    if model == "llama":
        return _sentencepiece_parts(fields, _Vocabulary.read(fields))
    fields.refuse(
        "tokenizer.ggml.model",
        "a tokenizer that is not read",
        "Files with `gpt2` (byte-level BPE) and `llama` (SentencePiece) are.",
    )


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens and their kinds, by id. Where a text occurs twice, the first id encodes it."""

    texts: list[str]
    kinds: list[int]
    ids: dict[str, int]

    @classmethod
    def read(cls, fields: Fields) -> _Vocabulary:
        texts = _strings(fields, "tokenizer.ggml.tokens", MAX_VOCABULARY)
        if not texts:
            fields.damaged("tokenizer.ggml.tokens", "a list with at least one token")
        kinds = _numbers(fields, "tokenizer.ggml.token_type", len(texts), TokenKind.NORMAL)
        ids: dict[str, int] = {}
        for token_id, text in enumerate(texts):
            ids.setdefault(text, token_id)
        return cls(texts, [int(kind) for kind in kinds], ids)

    def of_kind(self, *kinds: TokenKind) -> list[int]:
        return [token_id for token_id, kind in enumerate(self.kinds) if kind in kinds]

    @property
    def special_ids(self) -> list[int]:
        return self.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN)


def _strings(fields: Fields, name: str, limit: int) -> list[str]:
    values = fields.items(name, limit)
    if not all(isinstance(value, str) for value in values):
        fields.damaged(name, "a list of strings")
    return [str(value) for value in values]


def _numbers(fields: Fields, name: str, length: int, default: float | None = None) -> list[float]:
    """A list of exactly `length` numbers; all `default` where the file has none."""
    if default is not None and not fields.has(name):
        return [default] * length
    values = fields.items(name, MAX_VOCABULARY)
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) != length or any(number != number for number in numbers):
        fields.damaged(name, f"a list of {length} numbers, one for each token")
    return numbers


def _byte_level_parts(fields: Fields, vocabulary: _Vocabulary) -> TokenizerParts:
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    name = fields.text("tokenizer.ggml.pre", "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        fields.refuse(
            "tokenizer.ggml.pre",
            "a splitting rule that is not known",
            f"Known are {', '.join(sorted(SPLITTINGS))}; a safetensors release has its own `tokenizer.json`.",
        )
    merges = [_halves(fields, merge) for merge in _strings(fields, "tokenizer.ggml.merges", MAX_MERGES)]
    backend = _backend(
        fields, lambda: models.BPE(vocabulary.ids, merges, ignore_merges=splitting.ignore_merges)
    )
    if splitting.composes:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    return _finish(fields, vocabulary, backend, Scheme.BYTE_LEVEL, adds_bos=splitting.adds_bos)


def _halves(fields: Fields, merge: str) -> tuple[str, str]:
    # Byte-level tokens never hold a space, but one that begins with it would still be cut after it.
    cut = merge.find(" ", 1)
    if cut < 0:
        fields.damaged("tokenizer.ggml.merges", "a list of pairs separated by a space")
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece_parts(fields: Fields, vocabulary: _Vocabulary) -> TokenizerParts:
    from tokenizers import models, normalizers

    scores = _numbers(fields, "tokenizer.ggml.scores", len(vocabulary.texts))
    merges = _merges_by_score(fields, vocabulary, scores)
    unknown = vocabulary.of_kind(TokenKind.UNKNOWN)
    unknown_text = vocabulary.texts[unknown[0]] if unknown else None
    backend = _backend(
        fields,
        lambda: models.BPE(vocabulary.ids, merges, unk_token=unknown_text, fuse_unk=True, byte_fallback=True),
    )
    mark_spaces = normalizers.Replace(" ", SPACE_MARK)
    prefixed = fields.flag("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE_MARK), mark_spaces]) if prefixed else mark_spaces
    )
    return _finish(fields, vocabulary, backend, Scheme.SENTENCEPIECE, adds_bos=True, prefixed=prefixed)


def _merges_by_score(fields: Fields, vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE would make, best piece first.

    SentencePiece joins the adjacent pair whose *result* has the highest score; a merge list ranks *pairs*.
    So every way to cut a piece in two known pieces gets the piece's rank. Where one piece can be reached
    through two different cuts at once, SentencePiece takes the leftmost and a merge list the cut listed
    first, as every fast tokenizer of these models does.
    """
    mergeable = {
        text: i for i, text in enumerate(vocabulary.texts) if vocabulary.kinds[i] == TokenKind.NORMAL
    }
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, token_id in mergeable.items():
        if len(text) > MAX_PIECE_CHARACTERS:
            fields.damaged(
                "tokenizer.ggml.tokens", f"a list of pieces under {MAX_PIECE_CHARACTERS} characters"
            )
        for cut in range(1, len(text)):
            left, right = mergeable.get(text[:cut]), mergeable.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], left, right, (text[:cut], text[cut:])))
    ranked.sort()
    return [pair for *_, pair in ranked]


def _backend(fields: Fields, build: Callable[[], tokenizers.models.BPE]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer(build())
    except Exception as error:  # The library raises nothing narrower.
        raise ModelFileDamaged(
            f"{fields.where}: the tokenizer's vocabulary and merges do not fit together: {str(error)[:200]}.",
            hint="Fetch the file again, or convert the model again.",
        ) from error


def _finish(
    fields: Fields,
    vocabulary: _Vocabulary,
    backend: tokenizers.Tokenizer,
    scheme: Scheme,
    *,
    adds_bos: bool,
    prefixed: bool = False,
) -> TokenizerParts:
    """What both kinds share: tokens matched as they stand, and those put around the text."""
    user_ids = vocabulary.of_kind(TokenKind.USER_DEFINED)
    _match_as_they_stand(backend, vocabulary, vocabulary.special_ids, special=True)
    _match_as_they_stand(backend, vocabulary, user_ids, special=False)
    bos_id, eos_id = _token_id(fields, vocabulary, "bos"), _token_id(fields, vocabulary, "eos")
    before = bos_id if fields.flag("tokenizer.ggml.add_bos_token", adds_bos) else None
    after = eos_id if fields.flag("tokenizer.ggml.add_eos_token", False) else None
    _surround(backend, vocabulary, before, after)
    return TokenizerParts(
        backend=backend,
        scheme=scheme,
        drops_leading_space=prefixed,
        texts=vocabulary.texts,
        added_ids=frozenset([*vocabulary.special_ids, *user_ids]),
        special_ids=frozenset(vocabulary.special_ids),
        bos_id=bos_id,
        eos_ids=_ends(fields, vocabulary, eos_id),
    )


def _match_as_they_stand(
    backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, ids: list[int], *, special: bool
) -> None:
    from tokenizers import AddedToken

    texts = [vocabulary.texts[token_id] for token_id in ids if vocabulary.texts[token_id]]
    backend.add_tokens([AddedToken(text, normalized=False, special=special) for text in texts])


def _surround(
    backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, before: int | None, after: int | None
) -> None:
    from tokenizers import processors

    wrapped = [token_id for token_id in (before, after) if token_id is not None]
    if not wrapped:
        return
    # The template refers to tokens by a label; ours cannot clash with the placeholder `$A`.
    template = [f"<{before}>"] * (before is not None) + ["$A"] + [f"<{after}>"] * (after is not None)
    labels = [(f"<{token_id}>", token_id) for token_id in set(wrapped)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=labels)


def _token_id(fields: Fields, vocabulary: _Vocabulary, role: str) -> int | None:
    name = f"tokenizer.ggml.{role}_token_id"
    return fields.integer(name, 0, len(vocabulary.texts) - 1) if fields.has(name) else None


def _ends(fields: Fields, vocabulary: _Vocabulary, eos_id: int | None) -> frozenset[int]:
    """Ids that end an answer: end of text, of turn and of message."""
    eot_id = _token_id(fields, vocabulary, "eot")
    named = {eos_id, eot_id, _token_id(fields, vocabulary, "eom")}
    if eot_id is None:
        controls = vocabulary.of_kind(TokenKind.CONTROL)
        named |= {token_id for token_id in controls if vocabulary.texts[token_id] in END_OF_TURN_TEXTS}
    return frozenset(token_id for token_id in named if token_id is not None)
