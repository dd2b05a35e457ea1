"""The wire form of chat completions: chunks of a stream and the whole answer, from the same deltas."""

from __future__ import annotations

from typing import Any

from penstock.gateway.inflight import Delta, ScoredToken, Usage
from penstock.gateway.render import JSON, Head, Whole, ranked, usage_json, wire_logprob
from penstock.gateway.text import Tokenizer


class ChatRenderer:
    """Renders one call. `has_logprobs`: the client asked for them."""

    id_prefix = "chatcmpl-"

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, has_logprobs: bool, has_usage_chunk: bool
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._has_usage_chunk = has_usage_chunk
        self._opened: set[int] = set()

    def chunks(self, delta: Delta) -> list[JSON]:
        """The choice's first delta carries the role, its last is empty and carries the finish reason."""
        chunks = []
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            chunks.append(self._chunk(delta.index, {"role": "assistant", "content": ""}))
        if delta.text or delta.scored:
            logprobs = self._logprobs(delta.scored)
            chunks.append(self._chunk(delta.index, {"content": delta.text}, logprobs))
        if delta.finish_reason is not None:
            last = self._chunk(delta.index, {}, finish_reason=delta.finish_reason)
            last["choices"][0]["stop_reason"] = delta.stop_reason
            chunks.append(last)
        return chunks

    def usage_chunk(self, usage: Usage) -> JSON:
        return {**self._head.json("chat.completion.chunk"), "choices": [], "usage": usage_json(usage)}

    def whole(self, answers: list[Whole], usage: Usage) -> JSON:
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.scored),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for answer in answers
        ]
        return {**self._head.json("chat.completion"), "choices": choices, "usage": usage_json(usage)}

    def _chunk(
        self, index: int, delta: JSON, logprobs: JSON | None = None, finish_reason: str | None = None
    ) -> JSON:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head.json("chat.completion.chunk"), "choices": [choice]}
        if self._has_usage_chunk:
            chunk["usage"] = None
        return chunk

    def _logprobs(self, scored: list[ScoredToken]) -> JSON | None:
        if not self._has_logprobs:
            return None
        return {"content": [self._entry(token) for token in scored], "refusal": None}

    def _entry(self, token: ScoredToken) -> JSON:
        assert token.logprobs is not None, "chat never echoes a prompt"
        top = [self._alternative(token_id, logprob) for token_id, logprob in ranked(token.logprobs.top)]
        return {**self._alternative(token.token_id, token.logprobs.logprob), "top_logprobs": top}

    def _alternative(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": wire_logprob(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }
