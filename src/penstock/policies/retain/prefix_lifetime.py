"""Keep a group's shared prefix as long as the group lives, and no longer."""

from __future__ import annotations

from collections import OrderedDict

from penstock.core.request import Request
from penstock.policies.base import NoOptions
from penstock.policies.context import Context
from penstock.policies.estimate.groups import GroupKey, Groups
from penstock.policies.retain import RETAIN, Retain

_Blocks = OrderedDict[int, None]


@RETAIN.register("prefix-lifetime", source="BatchLLM (MLSys 2026, arXiv 2412.03594): KV owned by its group")
class PrefixLifetime(Retain):
    """Drop prefixes of groups that have ended first, prefixes of living groups last, the rest by LRU.

    A group's prefix is the blocks within `shared_len` of its members. It is kept until the last member has
    ended, however long its members have to wait in between; then nobody will ask for it again. When
    blocks of living groups are all that is parked, the group that parked least lately gives, its last first.

    Reads `group_id`, `tenant` and `shared_len`. O(1) an event, O(blocks of a prefix) when its group begins
    or ends. Memory: the parked blocks.
    """

    def __init__(self, context: Context, options: NoOptions) -> None:
        self._groups = context.shared(Groups)
        self._groups.on_opened.append(self._opened)
        self._groups.on_closed.append(self._closed)
        self._others: _Blocks = OrderedDict()  # oldest first, as in LRU
        self._kept: OrderedDict[GroupKey, _Blocks] = OrderedDict()  # prefixes of living groups
        self._spent: OrderedDict[GroupKey, _Blocks] = OrderedDict()  # of those that have ended
        self._owner: dict[int, GroupKey] = {}  # of every parked prefix block

    def parked(self, block: int, request: Request, now_s: float) -> None:
        self._others[block] = None

    def parked_at(self, block: int, end_len: int, request: Request, now_s: float) -> None:
        if request.group_id is None or end_len > request.shared_len:
            self.parked(block, request, now_s)
            return
        key = (request.tenant, request.group_id)
        place = self._kept if self._groups.is_open(key) else self._spent
        place.setdefault(key, OrderedDict())[block] = None
        place.move_to_end(key)
        self._owner[block] = key

    def revived(self, block: int) -> None:
        key = self._owner.pop(block, None)
        if key is None:
            del self._others[block]
            return
        place = self._kept if block in self._kept.get(key, ()) else self._spent
        del place[key][block]
        if not place[key]:
            del place[key]

    def victim(self, now_s: float) -> int:
        if not self._spent and self._others:
            return self._others.popitem(last=False)[0]
        place = self._spent or self._kept
        key = next(iter(place))
        block, _ = place[key].popitem(last=False)
        if not place[key]:
            del place[key]
        del self._owner[block]
        return block

    def __len__(self) -> int:
        return len(self._others) + len(self._owner)

    def _opened(self, key: GroupKey) -> None:
        """A group of that name lives again: what is left of its prefix is worth keeping."""
        if (blocks := self._spent.pop(key, None)) is not None:
            self._kept[key] = blocks

    def _closed(self, key: GroupKey) -> None:
        if (blocks := self._kept.pop(key, None)) is not None:
            self._spent[key] = blocks
