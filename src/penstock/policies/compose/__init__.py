"""Slot `compose`: how many tokens of each running sequence the next step computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.policies.registry import Registry
from penstock.policies.view import ReplicaView, SequenceView


@dataclass(frozen=True, slots=True)
class Share:
    """`count` >= 1 tokens of `sequence` in the next step."""

    sequence: SequenceView
    count: int


class Compose(Protocol):
    """`prefill_room` bounds admission: nobody starts without room in the step. `compose` splits it."""

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        """Prompt tokens the next step can take from requests that have not started."""

    def compose(self, view: ReplicaView, now_s: float) -> list[Share]:
        """At most one share a sequence, in the order of `view.running`; never empty while something runs."""


COMPOSE: Registry[Compose] = Registry("compose")
