"""Slot `retain`: what happens to KV blocks after their last user leaves, until somebody needs the room."""

from __future__ import annotations

from abc import abstractmethod

from penstock.core.request import Request
from penstock.policies.base import Policy
from penstock.policies.registry import Registry


class Retain(Policy):
    """Observes blocks becoming unused (`parked`) or used again (`revived`); names the next to drop."""

    @abstractmethod
    def parked(self, block: int, request: Request, now_s: float) -> None: ...

    @abstractmethod
    def revived(self, block: int) -> None: ...

    @abstractmethod
    def victim(self, now_s: float) -> int:
        """One parked block, which it forgets. Called only when there is one."""

    @abstractmethod
    def __len__(self) -> int:
        """How many blocks are parked."""


RETAIN: Registry[Retain] = Registry("retain")
