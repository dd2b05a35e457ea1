"""Moves of KV between device and host, and what may not be touched while they are under way.

    preempted ─► out ─► (copy done) its blocks are free ─► waits ─► in ─► (copy done) it may run

A block with a copy under way is guarded: it counts as held, and whoever must have it makes the step wait for
that copy. Copies are done in the order in which they were planned, so copies need no guard among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from penstock.core.request import Request
from penstock.core.step import Copy, CopyDone, Direction, Extent
from penstock.core.units import ceil_div
from penstock.policies.preempt import CopySize, Manner, Preempt
from penstock.policies.view import CopyFacts, ReplicaView
from penstock.replica.draft import PlanDraft
from penstock.replica.host_tier import HostCopy, HostTier, RankOf
from penstock.replica.kv_pool import KVPool
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaStats
from penstock.replica.sequence import Sequence

_Pairs = Iterable[tuple[int, int]]  # device block, host block


@dataclass(slots=True, eq=False)
class Flight:
    """A copy under way. `blocks` are guarded: nobody's, and free when it is done."""

    copy: Copy
    host: HostCopy
    request: Request
    first_len: int  # tokens before the first that it copies
    good_len: int  # tokens on the host when it is done
    loads: Sequence | None = None  # who runs when it is done
    blocks: list[int] = field(default_factory=list)
    shared_count: int = 0  # leading ones that may be in the prefix index


class Swapping:
    """One replica's host tier in use. Exists only where there is host room."""

    def __init__(
        self,
        limits: ReplicaLimits,
        pool: KVPool,
        preempt: Preempt,
        draft: PlanDraft,
        stats: ReplicaStats,
        rank_of: RankOf,
    ) -> None:
        self._limits = limits
        self._block_tokens = limits.kv_block_tokens
        self._pool = pool
        self._preempt = preempt
        self._draft = draft
        self._stats = stats
        self._rank_of = rank_of
        self._tier = HostTier(limits.host_kv_blocks, limits.kv_block_tokens, limits.kv_group_blocks)
        self._flights: dict[int, Flight] = {}  # by copy_id, in order
        self._copies_planned = 0
        self.loading: dict[int, Sequence] = {}  # by seq_id: admitted, with a copy under way

    @property
    def is_busy(self) -> bool:
        return bool(self._flights)

    @property
    def blocks_guarded(self) -> int:
        """Blocks that will be available when the copies under way are done: nobody else holds them."""
        return sum(self._pool.sole(flight.blocks) for flight in self._flights.values())

    @property
    def host_used(self) -> int:
        return self._tier.used_count

    # ---- out ------------------------------------------------------------------------------------------

    def out(self, victim: Sequence, view: ReplicaView, now_s: float) -> int:
        """`victim` is about to give its blocks back: how many of its tokens the host has, or will have.

        Blocks that a copy still reads are taken out of its list; the rest is the caller's to release.
        """
        length = victim.computed_len
        size = self._size_out(victim, length)
        if size is None:
            self._tier.discard(victim)
            return 0
        manner = self._preempt.swap_out(victim, size, view, now_s)
        if manner is Manner.RECOMPUTE:
            self._tier.discard(victim)
            return 0
        return self._copy_out(victim, length, waits=manner is Manner.SWAP)

    def turn_ended(self, sequence: Sequence) -> None:
        """It has all its tokens. Where its session may go on, the host keeps what is known of it."""
        request = sequence.request
        if request.session_id is None or request.is_last_turn or not self._preempt.keeps_copies:
            self._tier.discard(sequence)
            return
        if sequence.running and self._preempt.keeps_turns:
            full_blocks = sequence.computed_len // self._block_tokens
            known = len(sequence.key_blocks(full_blocks, self._block_tokens))
            if known:
                self._copy_out(sequence, known * self._block_tokens, waits=False)
        self._tier.end_turn(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It is gone for good: cancelled, or failed."""
        self._tier.discard(sequence)

    def _size_out(self, victim: Sequence, length: int) -> CopySize | None:
        """What a swap-out would copy; None where the host has no room for anything new or old."""
        kept_len = self._tier.room_for(victim, length, self._rank_of)
        if kept_len == 0:
            return None
        first, stop = self._range_out(victim, kept_len)
        return CopySize(kept_len, stop - first, length - kept_len)

    def _range_out(self, victim: Sequence, length: int) -> tuple[int, int]:
        """The blocks of `victim` that the host does not have yet, of those that hold its first `length`."""
        copy = self._tier.copy_of(victim)
        first = 0 if copy is None else copy.valid_len // self._block_tokens
        stop = ceil_div(length, self._block_tokens)
        return (stop, stop) if copy is not None and copy.valid_len >= length else (min(first, stop), stop)

    def _copy_out(self, victim: Sequence, length: int, *, waits: bool) -> int:
        host, length = self._tier.reserve(victim, length, self._rank_of)
        first, stop = self._range_out(victim, length)
        if first == stop:
            return min(length, host.valid_len)
        blocks = victim.blocks[first:stop]
        copy = self._plan_copy(victim, Direction.OUT, zip(blocks, host.blocks[first:stop], strict=True))
        flight = Flight(copy, host, victim.request, first * self._block_tokens, length)
        self._begin(flight, waits)
        if not waits:
            flight.blocks = blocks
            published = victim.published_blocks
            flight.shared_count = max(0, min(published, stop) - first)
            victim.blocks = victim.blocks[:first] + victim.blocks[stop:]
            victim.published_blocks = min(published, first) + max(0, published - stop)
        return length

    # ---- in -------------------------------------------------------------------------------------------

    def found_len(self, sequence: Sequence) -> int:
        """Tokens of KV on the host; one token at least is left to compute, to sample from."""
        if sequence.request.sampling.prompt_logprobs and sequence.first_token_s is None:
            return 0  # cached positions yield no logits
        return min(self._tier.found_len(sequence), sequence.total_len - 1)

    def is_leaving(self, sequence: Sequence) -> bool:
        """Whether its own copying out is under way."""
        copy = self._tier.copy_of(sequence)
        return copy is not None and copy.flights > 0

    def load(
        self, sequence: Sequence, cached_blocks: int, restored_len: int, view: ReplicaView, now_s: float
    ) -> bool:
        """Copy [cached blocks, `restored_len`) into the sequence's blocks. Whether the sequence must wait."""
        host = self._tier.adopt(sequence)
        assert host is not None and host.valid_len >= restored_len > cached_blocks * self._block_tokens
        stop = ceil_div(restored_len, self._block_tokens)
        pairs = zip(sequence.blocks[cached_blocks:stop], host.blocks[cached_blocks:stop], strict=True)
        copy = self._plan_copy(sequence, Direction.IN, pairs)
        size = CopySize(restored_len, copy.block_count, 0)
        waits = self._preempt.swap_in_waits(sequence, size, view, now_s)
        loads = None if waits else sequence
        self._begin(Flight(copy, host, sequence.request, 0, restored_len, loads), waits)
        if not waits:
            self.loading[sequence.seq_id] = sequence
        if not self._preempt.keeps_copies:
            self._tier.discard(sequence)  # goes when it is read
        return not waits

    def started(self, sequence: Sequence) -> None:
        """It starts with nothing from the host: what its conversation left there is told apart by content."""
        self._tier.adopt(sequence)

    def unload(self, sequence: Sequence) -> None:
        """It was cancelled with its copy under way: its blocks are guarded until that is done."""
        del self.loading[sequence.seq_id]
        flight = next(each for each in self._flights.values() if each.loads is sequence)
        flight.loads = None
        flight.blocks, flight.shared_count = sequence.blocks, sequence.published_blocks
        sequence.blocks, sequence.published_blocks = [], 0
        self._pool.drop_tail(sequence.seq_id)

    # ---- both -----------------------------------------------------------------------------------------

    def take_guarded(self, count: int, now_s: float) -> None:
        """Free `count` guarded blocks or more now: the step waits for their copies, oldest first."""
        for flight in self._flights.values():
            if self._pool.available >= count:
                return
            if flight.blocks:
                self._draft.wait(flight.copy.copy_id)
                self._release(flight, now_s)

    def wait_for_any(self) -> None:
        """Nothing can be computed until a copy is done."""
        self._draft.wait(next(iter(self._flights)))

    def done(
        self, result: SequenceOf[CopyDone], now_s: float, hooks: SequenceOf[Callable[..., Any]]
    ) -> Iterator[tuple[Sequence, bool]]:
        """Account finished copies; yields who was loaded, and whether its KV is good."""
        for told in result:
            flight = self._flights.pop(told.copy_id)
            copy, host = flight.copy, flight.host
            host.flights -= 1
            if copy.direction is Direction.OUT and told.ok:
                host.valid_len = max(host.valid_len, flight.good_len)
            elif copy.direction is Direction.OUT:
                self._tier.spoil(host, flight.first_len)
            self._stats.swap_failures_total += not told.ok
            self._release(flight, now_s)
            self._tier.settle(host)
            facts = CopyFacts(
                copy.direction is Direction.OUT, copy.block_count, len(copy.extents), told.seconds
            )
            for hook in hooks:
                hook(facts, now_s)
            if flight.loads is not None:
                del self.loading[flight.loads.seq_id]
                if not told.ok:
                    self._tier.discard(flight.loads)
                yield flight.loads, told.ok

    def abandon(self, now_s: float) -> None:
        """The executor forgets everything: no copy will ever be done."""
        for flight in self._flights.values():
            self._release(flight, now_s)
        self._flights.clear()
        assert not self.loading, "everybody was told its end"

    def holders(self) -> list[list[int]]:
        """Blocks of sequences that load, and guarded ones."""
        return [s.blocks for s in self.loading.values()] + [
            f.blocks for f in self._flights.values() if f.blocks
        ]

    def check_invariants(self) -> None:
        """Raises AssertionError. O(blocks)."""
        self._tier.check_invariants()
        loads = {f.loads.seq_id: f.loads for f in self._flights.values() if f.loads is not None}
        assert loads == self.loading, "who loads has a copy under way"

    def _plan_copy(self, sequence: Sequence, direction: Direction, pairs: _Pairs) -> Copy:
        extents = _extents_of(pairs, merge=self._preempt.copies_runs)
        copy = Copy(self._copies_planned, sequence.seq_id, direction, extents)
        self._copies_planned += 1
        stats, way = self._stats, direction.value
        stats.swap_copies_total[way] += len(extents)
        stats.swap_blocks_total[way] += copy.block_count
        stats.swap_bytes_total[way] += copy.block_count * self._limits.kv_block_bytes
        return copy

    def _begin(self, flight: Flight, waits: bool) -> None:
        flight.host.flights += 1
        self._flights[flight.copy.copy_id] = flight
        self._stats.swaps_total[flight.copy.direction.value] += 1
        self._draft.copy(flight.copy)
        if waits:
            self._draft.wait(flight.copy.copy_id)

    def _release(self, flight: Flight, now_s: float) -> None:
        if flight.blocks:
            first = flight.first_len // self._block_tokens
            self._pool.release(flight.blocks, flight.shared_count, flight.request, now_s, first)
            flight.blocks = []


def _extents_of(pairs: _Pairs, *, merge: bool) -> tuple[Extent, ...]:
    """Stretches in which both sides are consecutive; each block by itself without `merge`."""
    extents: list[Extent] = []
    for device, host in pairs:
        if merge and extents:
            first_device, first_host, count = extents[-1]
            if (first_device + count, first_host + count) == (device, host):
                extents[-1] = (first_device, first_host, count + 1)
                continue
        extents.append((device, host, 1))
    return tuple(extents)
