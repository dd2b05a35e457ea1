"""Slot `preempt`: who gives KV back when a running sequence needs a block and none is left."""

from __future__ import annotations

from typing import Protocol

from penstock.policies.registry import Registry
from penstock.policies.view import ReplicaView, SequenceView


class Preempt(Protocol):
    """The victim is computed again later from its prompt and output so far; no token is lost or changed."""

    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        """One of `view.running`; `needy` itself when nobody else should yield."""


PREEMPT: Registry[Preempt] = Registry("preempt")
