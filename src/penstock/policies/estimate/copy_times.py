"""How long copies between device and host take, learned from those that are done."""

from __future__ import annotations

from collections import deque
from typing import Final

from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.view import CopyFacts

RING: Final = 32


class CopyTimes(Observer):
    """Seconds of a copy, from the mean bandwidth of the last `RING`; knows nothing before the first.

    What a copy costs to begin is in the mean, so it holds for copies of about the usual runs. O(1).
    """

    def __init__(self, context: Context) -> None:
        self._recent: deque[CopyFacts] = deque(maxlen=RING)

    @property
    def is_ready(self) -> bool:
        return bool(self._recent)

    def seconds(self, blocks: int) -> float:
        """Of copying `blocks`, without the wait for other copies. Only where `is_ready`."""
        copied = sum(facts.blocks for facts in self._recent)
        return blocks * sum(facts.seconds for facts in self._recent) / copied

    def copied(self, facts: CopyFacts, now_s: float) -> None:
        self._recent.append(facts)
