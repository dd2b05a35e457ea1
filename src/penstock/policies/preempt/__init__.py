"""Slot `preempt`: who gives KV or a slot back, to whom, and in which manner."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from penstock.policies.base import Policy
from penstock.policies.registry import Registry
from penstock.policies.view import Refusal, ReplicaView, SequenceView


class Manner(Enum):
    """What becomes of a victim's KV."""

    RECOMPUTE = auto()  # dropped
    SWAP = auto()  # copied to the host, and the next step begins when that is done
    SWAP_BESIDE = auto()  # copied to the host beside the steps; its blocks are free when that is done


@dataclass(frozen=True, slots=True)
class CopySize:
    """What a swap would move, and what it would save."""

    kept_len: int  # tokens that need not be computed again
    blocks: int  # to copy: what the other side does not have yet
    lost_len: int  # tokens to compute again, for want of room on the host


class Preempt(Policy):
    """The victim goes on later from its prompt and output so far; no token is lost or changed.

    Where the replica has host memory for KV (`replica.host_kv_memory`), a policy may have it copied there
    and back. `copies_runs`: consecutive blocks are one copy. `keeps_copies`: what the host has stays there
    when it was copied back, so that the next swap adds what is new. `keeps_turns`: a session's KV is copied
    when a turn of it ends, for the next one.
    """

    swaps: ClassVar[bool] = False  # whether it ever does
    copies_runs: bool = True
    keeps_copies: bool = False
    keeps_turns: bool = False

    @abstractmethod
    def victim(self, needy: SequenceView, view: ReplicaView, now_s: float) -> SequenceView:
        """A running sequence needs a block and none is available: one of `view.running` yields.

        `needy` itself when nobody else should.
        """

    def sits_out(self, needy: SequenceView, view: ReplicaView, now_s: float) -> bool:
        """Whether `needy`, a decode without a block, skips the step rather than have somebody yield.

        Asked before `victim`, and only where another decode goes on, so that something always advances.
        """
        return False

    def make_room(self, refusal: Refusal, view: ReplicaView, now_s: float) -> SequenceView | None:
        """The head of the queue cannot start: who yields to it? None: nobody, it waits.

        Asked again after each victim, until the head starts or nobody yields. Whoever yields must rank
        strictly behind the head, or two could push each other out in turn.
        """
        return None

    def swap_out(self, victim: SequenceView, size: CopySize, view: ReplicaView, now_s: float) -> Manner:
        """`victim` yields and the host has room: is its KV kept?"""
        return Manner.RECOMPUTE

    def swap_in_waits(self, sequence: SequenceView, size: CopySize, view: ReplicaView, now_s: float) -> bool:
        """`sequence` starts from the host's copy: does the step wait for it, or run without it meanwhile?"""
        return True


PREEMPT: Registry[Preempt] = Registry("preempt")
