"""Slot `retain`: what happens to KV blocks after their last user leaves, until somebody needs the room."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from penstock.core.request import Request
from penstock.policies.base import Policy
from penstock.policies.registry import Registry
from penstock.policies.view import PinView, ReplicaView, SequenceView


class Retain(Policy):
    """Observes blocks becoming unused (`parked`) or used again (`revived`); names the next to drop.

    A pin is a promise that goes beyond: pinned blocks are held, and nobody else's, until the pin's time is
    up (and no turn of its program waits), or the pin has to be sacrificed. `pins`: whether it makes any.
    """

    pins: ClassVar[bool] = False

    @abstractmethod
    def parked(self, block: int, request: Request, now_s: float) -> None: ...

    def parked_at(self, block: int, end_len: int, request: Request, now_s: float) -> None:
        """As `parked`; override where it matters that the block holds tokens up to `end_len`."""
        self.parked(block, request, now_s)

    @abstractmethod
    def revived(self, block: int) -> None: ...

    @abstractmethod
    def victim(self, now_s: float) -> int:
        """One parked block, which it forgets. Called only when there is one."""

    def turn_ended(self, sequence: SequenceView, view: ReplicaView, now_s: float) -> float | None:
        """A turn of a program ends well, and another will follow: until when its KV is pinned.

        None: not at all; infinity: without end. Asked while the sequence still runs, and only where `pins`.
        """
        return None

    def sacrifice(self, pins: Iterable[PinView], now_s: float) -> PinView:
        """Nobody can go on without room, and only pins are left to give it: which goes? There is one.

        By default that with the latest expiry, which would hold its memory longest; among equals that of
        the youngest turn.
        """
        return max(pins, key=lambda pin: (pin.until_s, pin.arrival_index))

    @abstractmethod
    def __len__(self) -> int:
        """How many blocks are parked."""


RETAIN: Registry[Retain] = Registry("retain")
