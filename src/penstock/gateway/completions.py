"""The wire form of legacy completions: chunks of a stream and the whole answer, from the same deltas."""

from __future__ import annotations

from penstock.gateway.inflight import Delta, ScoredToken, Usage
from penstock.gateway.render import JSON, Head, Whole, ranked, usage_json, wire_logprob
from penstock.gateway.text import Tokenizer


class CompletionRenderer:
    """Renders one call. `text_offset` counts characters of the returned text, the echoed prompt included."""

    id_prefix = "cmpl-"

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, has_logprobs: bool, has_usage_chunk: bool
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._has_usage_chunk = has_usage_chunk
        self._offset_chars: dict[int, int] = {}  # by choice

    def chunks(self, delta: Delta) -> list[JSON]:
        """Text first; the finish reason follows in a chunk of its own with empty text."""
        chunks = []
        if delta.text or delta.scored:
            choice = self._choice(delta.index, delta.text, delta.scored, None, None)
            chunks.append(self._chunk(choice))
        if delta.finish_reason is not None:
            chunks.append(
                self._chunk(self._choice(delta.index, "", None, delta.finish_reason, delta.stop_reason))
            )
        return chunks

    def usage_chunk(self, usage: Usage) -> JSON:
        return {**self._head.json("text_completion"), "choices": [], "usage": usage_json(usage)}

    def whole(self, answers: list[Whole], usage: Usage) -> JSON:
        choices = [
            self._choice(answer.index, answer.text, answer.scored, answer.finish_reason, answer.stop_reason)
            for answer in answers
        ]
        return {**self._head.json("text_completion"), "choices": choices, "usage": usage_json(usage)}

    def _chunk(self, choice: JSON) -> JSON:
        chunk = {**self._head.json("text_completion"), "choices": [choice]}
        if self._has_usage_chunk:
            chunk["usage"] = None
        return chunk

    def _choice(
        self,
        index: int,
        text: str,
        scored: list[ScoredToken] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> JSON:
        is_scored = self._has_logprobs and scored is not None
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, scored or []) if is_scored else None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def _logprobs(self, index: int, scored: list[ScoredToken]) -> JSON:
        tokens = [self._tokenizer.token_text(token.token_id) for token in scored]
        offsets = []
        offset_chars = self._offset_chars.get(index, 0)
        for token in tokens:
            offsets.append(offset_chars)
            offset_chars += len(token)
        self._offset_chars[index] = offset_chars
        return {
            "tokens": tokens,
            "token_logprobs": [token.logprobs and wire_logprob(token.logprobs.logprob) for token in scored],
            "top_logprobs": [self._top(token) for token in scored],
            "text_offset": offsets,
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """The alternatives and the token itself, by text; None where there is no past to predict from."""
        if token.logprobs is None:
            return None
        top = {
            self._tokenizer.token_text(token_id): wire_logprob(logprob)
            for token_id, logprob in ranked(token.logprobs.top)
        }
        top.setdefault(self._tokenizer.token_text(token.token_id), wire_logprob(token.logprobs.logprob))
        return top
