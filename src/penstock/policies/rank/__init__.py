"""Slot `rank`: the order of waiting and running work. Smaller keys go first."""

from __future__ import annotations

from typing import Any, Protocol

from penstock.policies.registry import Registry
from penstock.policies.view import SequenceView

RankKey = tuple[Any, ...]


class Rank(Protocol):
    """A key stays valid while `version` returns the same number; the replica re-sorts when it changes."""

    def key(self, sequence: SequenceView, now_s: float) -> RankKey: ...

    def version(self, now_s: float) -> int: ...


RANK: Registry[Rank] = Registry("rank")
