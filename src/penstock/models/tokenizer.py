"""Text to token ids and back. Encoding is the `tokenizers` library's; decoding is by exact bytes, here.

Decoding a token at a time must agree with decoding all at once, and log-probabilities report each token's
bytes, so a token *is* its bytes: `decode` joins them and reads UTF-8. For valid text this equals the
library's own decoder. Where a model emits broken UTF-8, each broken sequence becomes one U+FFFD, as in
Python and in byte-level decoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Final

from penstock.core.errors import InvalidRequest, ModelFileDamaged
from penstock.models.source import ModelSource
from penstock.models.tokenizer_parts import Scheme, TokenizerParts

if TYPE_CHECKING:
    import tokenizers

_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One model's tokenizer. Immutable after construction; safe to share between threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._bytes_by_id: list[bytes | None] = [None] * len(parts.texts)
        self.scheme: Scheme = parts.scheme
        self.vocab_size: int = len(parts.texts)
        """One more than the highest id."""
        self.bos_id: int | None = parts.bos_id
        self.eos_ids: frozenset[int] = parts.eos_ids
        self.special_ids: frozenset[int] = parts.special_ids
        self.drops_leading_space: bool = parts.drops_leading_space

    @classmethod
    def load(cls, source: ModelSource) -> Tokenizer:
        """From `tokenizer.json` of a folder, or rebuilt from the metadata of a GGUF file.

        Raises `ModelNotAvailable`, `ModelFileDamaged` or `ModelUnsupported`.
        """
        if source.kind == "gguf":
            from penstock.models.gguf import GgufFile
            from penstock.models.tokenizer_gguf import parts_from_gguf

            return cls(parts_from_gguf(GgufFile(source.path).metadata, source.path.name))
        from penstock.models.tokenizer_folder import parts_from_folder

        return cls(parts_from_folder(source.path))

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `encode` with `add_special` begins with the model's start token."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of `text`. Pure.

        `add_special`: put the model's start (and end) tokens around it; leave out for a rendered chat
        template, which writes them itself. `parse_special`: text such as `<|im_end|>` becomes that control
        token, as rendered templates need; user text inside a template can therefore do the same, which
        is also what vLLM does. With `parse_special` off, control tokens are spelt out as ordinary text.

        NUL is a legal character. A lone surrogate is not text and raises `InvalidRequest` naming `param`.
        """
        _refuse_surrogates(text, param)
        backend = self._parts.backend if parse_special else self._literal_backend
        try:
            return list(backend.encode(text, add_special_tokens=add_special).ids)
        except Exception as error:  # The library raises nothing narrower.
            raise ModelFileDamaged(
                f"The model's tokenizer cannot encode the text: {str(error)[:200]}.",
                hint="Its files contradict each other; fetch the model again.",
            ) from error

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues_text: bool = False) -> str:
        """The text of `ids`. Pure. Ids without a token have no text; `check_ids` refuses them.

        A SentencePiece tokenizer begins every text with a space that is dropped here, once;
        `continues_text` keeps it, for ids that are appended to other text.
        """
        hidden = self.special_ids if skip_special else frozenset()
        raw = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in hidden)
        text = raw.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.drops_leading_space and not continues_text else text

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes the token stands for; they need not be whole characters. Empty for no token."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        known = self._bytes_by_id[token_id]
        if known is None:
            known = self._bytes_by_id[token_id] = self._spell(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The token alone as text; broken characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def check_ids(self, ids: Sequence[int], *, param: str) -> None:
        """Raises `InvalidRequest` naming `param` if an id is outside the vocabulary."""
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"`{param}[{position}]` is {token_id}; token ids go from 0 to {self.vocab_size - 1}.",
                    param=param,
                    hint="Get ids for this model from `POST /tokenize`.",
                )

    @cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        """A second backend that reads control tokens as plain text. The switch is state of the library's
        object, so one shared backend could not serve both kinds of call at once."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._parts.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _spell(self, token_id: int) -> bytes:
        text = self._parts.texts[token_id]
        if text is None:
            return b""
        if self.scheme is Scheme.SENTENCEPIECE:
            return _spell_piece(text)
        return text.encode() if token_id in self._parts.added_ids else _spell_byte_level(text)


def _refuse_surrogates(text: str, param: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"`{param}` has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}.",
            param=param,
            hint="Send whole characters: a surrogate is valid only in a pair.",
        ) from None


def _spell_piece(text: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


def _spell_byte_level(text: str) -> bytes:
    table = byte_of_character()
    # A token with a character outside the table was never merged from bytes: it is literal text.
    return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for their own byte, and the other bytes, in order,
    for the characters from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
