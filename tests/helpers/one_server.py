"""One server that works in quanta on whom a rank puts first: the setting in which scheduling papers argue.

A request is a prompt of one token and an output; the server makes one token in one unit of time, whoever it
serves, and changes to another request for nothing. The policy hears of everything as in a replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.policies.rank import Rank
from penstock.policies.view import StepFacts


@dataclass(eq=False)
class Standing:
    """A sequence whose lengths a test sets."""

    request: Request
    arrival_index: int
    submitted_s: float = 0.0
    output_len: int = 0
    computed_len: int = 0
    is_decoding: bool = False
    block_count: int = 0
    first_token_s: float | None = None

    @property
    def total_len(self) -> int:
        return self.request.prompt_len + self.output_len

    @property
    def output_left(self) -> int:
        return self.request.max_output_tokens - self.output_len


def serve_in_quanta(
    rank: Rank, requests: Sequence[Request], quantum: int, output_lens: Mapping[str, int] | None = None
) -> dict[str, float]:
    """When each request ends. Requests are in order of arrival; their ids are unique."""
    server = _Server(rank, quantum, output_lens or {})
    for index, request in enumerate(requests):
        server.run_until(request.arrival_s)
        server.submit(Standing(request, index, request.arrival_s))
    server.run_until(float("inf"))
    return server.ends


class _Server:
    def __init__(self, rank: Rank, quantum: int, output_lens: Mapping[str, int]) -> None:
        self._rank = rank
        self._quantum = quantum
        self._output_lens = output_lens
        self._inside: list[Standing] = []
        self._served: Standing | None = None
        self.now_s = 0.0
        self.ends: dict[str, float] = {}

    def submit(self, sequence: Standing) -> None:
        self.now_s = max(self.now_s, sequence.submitted_s)
        self._rank.submitted(sequence, self.now_s)
        self._inside.append(sequence)

    def run_until(self, until_s: float) -> None:
        while self._inside and self.now_s < until_s:
            self._turn()

    def _turn(self) -> None:
        rank = self._rank
        rank.version(self.now_s)
        first = min(self._inside, key=lambda each: (rank.key(each, self.now_s), each.arrival_index))
        if first is not self._served:
            if self._served is not None:
                self._served.is_decoding = False
                rank.left(self._served, self.now_s)
            rank.started(first, self.now_s)
            self._served = first
        length = self._output_lens.get(first.request.id, first.request.max_output_tokens)
        for _ in range(min(self._quantum, length - first.output_len)):
            self._token(first)
        if first.output_len == length:
            first.is_decoding = False
            self._inside.remove(first)
            self._served = None
            self.ends[first.request.id] = self.now_s
            rank.left(first, self.now_s)
            rank.finished(first, FinishReason.LENGTH, self.now_s)
            rank.stepped(StepFacts((), 0, 0, 1, 0.0), self.now_s)

    def _token(self, sequence: Standing) -> None:
        self.now_s += 1.0
        sequence.output_len += 1
        if sequence.is_decoding:
            self._rank.stepped(StepFacts((), 1, sequence.total_len, 1, 1.0), self.now_s)
            return
        sequence.is_decoding = True
        self._rank.decoding(sequence, self.now_s)
        self._rank.stepped(StepFacts((), 0, 0, 1, 1.0), self.now_s)
