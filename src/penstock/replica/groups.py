"""Who computes the shared beginning of a group: one member runs ahead, the others wait for its blocks."""

from __future__ import annotations

from penstock.replica.limits import ReplicaLimits
from penstock.replica.sequence import Sequence

_GroupKey = tuple[str, str]  # cache salt, group id: only equal salts find each other's blocks


class GroupLeaders:
    """The running member of each group that was started without the whole shared prefix.

    A group is what `Request.group_id` says, and shares the full blocks within `shared_len`. When a leader
    leaves before it is done, the next member to start takes its place. O(1) an event.
    """

    def __init__(self, limits: ReplicaLimits) -> None:
        self._limits = limits
        self._leaders: dict[_GroupKey, Sequence] = {}

    def started(self, sequence: Sequence) -> None:
        """`sequence` runs from now on; `computed` tokens were found."""
        if sequence.request.group_id is None or sequence.computed >= self._shared_len(sequence):
            return
        leader = self._leaders.get(_key_of(sequence))
        if leader is None or leader.computed_len >= self._shared_len(leader):
            self._leaders[_key_of(sequence)] = sequence

    def left(self, sequence: Sequence) -> None:
        """`sequence` no longer runs."""
        if sequence.request.group_id is not None and self._leaders.get(_key_of(sequence)) is sequence:
            del self._leaders[_key_of(sequence)]

    def is_computing(self, sequence: Sequence) -> bool:
        """Whether another member is still computing what the waiting `sequence` shares with it."""
        if sequence.request.group_id is None or not sequence.is_keyed or not self._limits.prefix_cache:
            return False
        leader = self._leaders.get(_key_of(sequence))
        if leader is None:
            return False
        return leader.computed_len < min(self._shared_len(leader), self._shared_len(sequence))

    def _shared_len(self, sequence: Sequence) -> int:
        """Tokens in full blocks, at most; the last token of a prompt is always computed."""
        request, block = sequence.request, self._limits.kv_block_tokens
        return min(request.shared_len, request.prompt_len - 1) // block * block


def _key_of(sequence: Sequence) -> _GroupKey:
    return (sequence.request.cache_salt, sequence.request.group_id or "")
