"""A byte-level tokenizer and a plain chat template: text in and out without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BOS, EOS = 256, 257


class ByteTokenizer:
    """A token is a byte; two control tokens follow. Same surface as `penstock.models.tokenizer.Tokenizer`."""

    vocab_size = 258
    eos_ids = frozenset({EOS})
    special_ids = frozenset({BOS, EOS})
    drops_leading_space = False

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int], **options: bool) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < BOS else b""

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


class PlainTemplate:
    """`role: content` lines."""

    def render(self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True) -> str:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")
