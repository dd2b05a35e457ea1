"""Slot `compose`: how many tokens of each running sequence the next step computes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.policies.base import Policy
from penstock.policies.registry import Registry
from penstock.policies.view import ReplicaView, SequenceView


@dataclass(slots=True)
class Share:
    """`count` >= 1 tokens of a prefilling `sequence` in the next step."""

    sequence: SequenceView
    count: int


@dataclass(slots=True)
class Composition:
    """The next step: shares of prompts, and whether the decodes advance, all but the `paused`."""

    shares: list[Share] = field(default_factory=list)
    decode: bool = True
    paused: list[SequenceView] = field(default_factory=list)


def pieces(prompts: Sequence[SequenceView], left: int) -> list[Share]:
    """Shares of `left` tokens in all, in order: whole prompts, and a piece of the last."""
    shares = []
    for sequence in prompts:
        if left <= 0:
            break
        count = sequence.total_len - sequence.computed_len
        if count > left:
            count = left
        left -= count
        shares.append(Share(sequence, count))
    return shares


class Compose(Policy):
    """`prefill_room` bounds admission: nobody starts without room in the step. `compose` splits it."""

    @abstractmethod
    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        """Prompt tokens the next step can take from requests that have not started."""

    @abstractmethod
    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        """At most one share a sequence; something advances while something runs."""


COMPOSE: Registry[Compose] = Registry("compose")
