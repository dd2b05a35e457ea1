"""Slot `retain`: what happens to KV blocks after their last user leaves, until somebody needs the room."""

from __future__ import annotations

from typing import Protocol

from penstock.core.request import Request
from penstock.policies.registry import Registry


class Retain(Protocol):
    """Observes blocks becoming unused (`parked`) or used again (`revived`); names the next to drop."""

    def parked(self, block: int, request: Request, now_s: float) -> None: ...

    def revived(self, block: int) -> None: ...

    def victim(self, now_s: float) -> int:
        """One parked block, which it forgets. Called only when there is one."""

    def __len__(self) -> int:
        """How many blocks are parked."""


RETAIN: Registry[Retain] = Registry("retain")
