"""Slot `admit`: which of the ranked may start now, and how much KV they hold from the start."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from penstock.core.reasons import WaitReason
from penstock.policies.base import Policy
from penstock.policies.registry import Registry
from penstock.policies.view import Candidate, ReplicaView


@dataclass(frozen=True, slots=True)
class Admission:
    """Start with KV for `reserve_len` tokens, or wait for `reason`."""

    reserve_len: int = 0
    reason: WaitReason | None = None


class Admit(Policy):
    """Asked for the head of the queue; while it must wait, nobody overtakes it.

    Must admit a feasible request when nothing else runs, or the queue would stand for ever.
    """

    @abstractmethod
    def decide(self, candidate: Candidate, view: ReplicaView, now_s: float) -> Admission: ...


ADMIT: Registry[Admit] = Registry("admit")
