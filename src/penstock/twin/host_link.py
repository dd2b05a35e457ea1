"""The link between a device and its host's memory, as modelled: one queue for both directions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock.core.settings import TwinSettings
from penstock.core.step import Copy, CopyDone
from penstock.replica.limits import ReplicaLimits

NEVER = float("inf")


class HostLink:
    """Copies take their turn: transfers x `launch_s`, and bytes over the bandwidth. Steps go on meanwhile.

    An extent is one transfer a layer (card fastswitch). Deterministic, and independent of how often it is
    looked at.
    """

    def __init__(self, block_bytes: int, layers: int, launch_s: float, bytes_per_s: float) -> None:
        self._block_bytes = block_bytes
        self._layers = layers
        self._launch_s = launch_s
        self._bytes_per_s = bytes_per_s
        self._flying: deque[tuple[float, CopyDone]] = deque()  # with the instant at which each is done
        self._free_s = 0.0
        self.failures_due = 0  # so many of the next copies that no step waits for at once fail

    @property
    def next_s(self) -> float:
        """When the next copy is done."""
        return self._flying[0][0] if self._flying else NEVER

    def seconds(self, copy: Copy) -> float:
        launches = len(copy.extents) * self._layers
        return launches * self._launch_s + copy.block_count * self._block_bytes / self._bytes_per_s

    def begin(self, copies: Sequence[Copy], waits: Sequence[int], now_s: float) -> None:
        for copy in copies:
            seconds = self.seconds(copy)
            self._free_s = max(self._free_s, now_s) + seconds
            fails = self.failures_due > 0 and copy.copy_id not in waits
            self.failures_due -= fails
            self._flying.append((self._free_s, CopyDone(copy.copy_id, seconds, not fails)))

    def done_s(self, copy_ids: Sequence[int]) -> float:
        """When the last of these is done; they are under way."""
        return max(at_s for at_s, done in self._flying if done.copy_id in copy_ids)

    def take(self, now_s: float) -> list[CopyDone]:
        """What is done by now, told once."""
        done = []
        while self._flying and self._flying[0][0] <= now_s:
            done.append(self._flying.popleft()[1])
        return done


def link_of(limits: ReplicaLimits, twin: TwinSettings) -> HostLink | None:
    """None where the replica has no host memory."""
    if not limits.host_kv_blocks:
        return None
    return HostLink(
        limits.kv_block_bytes, limits.kv_layers, twin.host_launch_us * 1e-6, twin.host_link_gb_per_s * 1e9
    )
