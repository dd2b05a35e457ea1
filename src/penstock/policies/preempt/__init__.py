"""Slot `preempt`: who gives KV or a slot back, to whom, and in which manner."""

from __future__ import annotations

from abc import abstractmethod

from penstock.policies.base import Policy
from penstock.policies.registry import Registry
from penstock.policies.view import Refusal, ReplicaView, SequenceView


class Preempt(Policy):
    """The victim goes on later from its prompt and output so far; no token is lost or changed."""

    @abstractmethod
    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        """A running sequence needs a block and none is available: one of `view.running` yields.

        `needy` itself when nobody else should.
        """

    def make_room(self, refusal: Refusal, view: ReplicaView, now_s: float) -> SequenceView | None:
        """The head of the queue cannot start: who yields to it? None: nobody, it waits.

        Asked again after each victim, until the head starts or nobody yields. Whoever yields must rank
        strictly behind the head, or two could push each other out in turn.
        """
        return None


PREEMPT: Registry[Preempt] = Registry("preempt")
