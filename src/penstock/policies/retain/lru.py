"""Drop what was unused longest."""

from __future__ import annotations

from collections import OrderedDict

from penstock.core.request import Request
from penstock.policies.base import NoOptions
from penstock.policies.context import Context
from penstock.policies.retain import RETAIN, Retain


@RETAIN.register("lru", source="vLLM v1 KV cache manager (free-block queue)")
class Lru(Retain):
    """Least recently used first. A sequence parks its last blocks first, so shared beginnings stay longest.

    O(1) an event. Not a plain dict: finding its first key passes over every key deleted before it.
    """

    def __init__(self, context: Context, options: NoOptions) -> None:
        self._parked: OrderedDict[int, None] = OrderedDict()

    def parked(self, block: int, request: Request, now_s: float) -> None:
        self._parked[block] = None

    def revived(self, block: int) -> None:
        del self._parked[block]

    def victim(self, now_s: float) -> int:
        block, _ = self._parked.popitem(last=False)
        return block

    def __len__(self) -> int:
        return len(self._parked)
