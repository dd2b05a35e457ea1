"""What both wire forms share: the head of every object, usage, log-probabilities, and folding deltas."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.gateway.inflight import Delta, ScoredToken, Usage

JSON = dict[str, Any]

LOGPROB_MIN = -9999.0  # JSON has no infinity; vLLM's floor


@dataclass(frozen=True, slots=True)
class Head:
    """Fields that are equal in every chunk of a call. `created_s` is Unix time."""

    id: str
    created_s: int
    model: str
    fingerprint: str

    def json(self, object_name: str) -> JSON:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class Whole:
    """A finished choice: all its deltas in one."""

    index: int
    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        assert self.finish_reason is None, "nothing follows the last delta"
        self.text += delta.text
        self.scored += delta.scored
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Renderer(Protocol):
    """One wire form of a call."""

    def chunks(self, delta: Delta) -> list[JSON]:
        """The stream's objects for what one choice has new, in order."""

    def usage_chunk(self, usage: Usage) -> JSON:
        """The stream's last object, when it was asked for."""

    def whole(self, answers: list[Whole], usage: Usage) -> JSON:
        """The body of a call that does not stream."""


def usage_json(usage: Usage) -> JSON:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def ranked(top: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Most likely first; equal ones by token id."""
    return sorted(top, key=lambda entry: (-entry[1], entry[0]))


def wire_logprob(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)
