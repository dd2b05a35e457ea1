"""What a tokenizer is made of, whichever files it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import tokenizers

MAX_VOCABULARY: Final = 2_097_152
"""Eight times the largest published vocabulary; ids at or beyond it are refused."""


class Scheme(StrEnum):
    """How a token's text in the vocabulary stands for bytes."""

    BYTE_LEVEL = "byte-level BPE"
    """Each character is one byte, through the table that GPT-2 introduced."""

    SENTENCEPIECE = "SentencePiece"
    """The text itself, with `▁` for a space and `<0x0A>` for a single byte."""


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """`backend` encodes; the rest is what decoding needs."""

    backend: tokenizers.Tokenizer
    scheme: Scheme
    drops_leading_space: bool
    """Encoding puts a space before the text, so decoding takes one away."""
    texts: Sequence[str | None]
    """Each token as the vocabulary writes it, by id; None where an id is not assigned."""
    added_ids: frozenset[int]
    """Tokens that are matched in the text as they stand, special or not."""
    special_ids: frozenset[int]
    """Control tokens: not part of the visible text."""
    bos_id: int | None
    eos_ids: frozenset[int]
