"""Fill the memory, not a number of places: a step is bounded by the KV it touches and by its tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from penstock.core.settings import setting
from penstock.policies.compose import COMPOSE, Compose, Composition, pieces
from penstock.policies.context import Context
from penstock.policies.estimate.groups import GroupKey, group_key
from penstock.policies.estimate.lengths import LengthBelief
from penstock.policies.estimate.peak import future_peak
from penstock.policies.view import ReplicaView, SequenceView


@dataclass(frozen=True, slots=True)
class MemoryCentricOptions:
    """`[policies.options.memory-centric]`."""

    kv_frac: float = setting(
        0.95, "share of the KV pool that a step may touch, growth to come included", low=0.05, high=1.0
    )


@dataclass(slots=True)
class _Running:
    """What one running sequence holds by itself, and how long its output will be."""

    sequence: SequenceView
    shared_len: int  # tokens of its prompt that its group holds once
    output_len: int  # expected in all

    @property
    def growth(self) -> int:
        return max(0, self.output_len - self.sequence.output_len)


@COMPOSE.register(
    "memory-centric", source="BatchLLM (MLSys 2026, arXiv 2412.03594): memory-centric token batching"
)
class MemoryCentric(Compose):
    """Admit while the KV that steps will touch stays below a share of the pool; decodes first, then chunks.

    Meant for a large `replica.running_max`: the limit is Σ KV tokens touched, a group's prefix counted
    once, at the peak that is still to come. With the running sequences in order of falling remaining
    output r, each holding h tokens of its own: peak = prefixes + max over k of (h_1 + ... + h_k + k·r_k), the
    formula of Past-Future (ASPLOS 2025). Expected outputs are the mean of what finished before, believed once
    when a sequence starts; the peak is looked at once after each start and end. The published code counts the
    context at hand and leaves growth to preemption; its default limit is infinite, this one is not.

    Room in a step is what its better-ranked prompts leave, so that a long prefill of the batch class does
    not stand between an online request and its start.

    Reads `prefilling` and `waiting`, and observes who runs. Costs O(running log running) after a start or an
    end while somebody waits, else O(prefilling); less where even the sum of all growth fits.
    """

    Options = MemoryCentricOptions

    def __init__(self, context: Context, options: MemoryCentricOptions) -> None:
        self._kv_frac = options.kv_frac
        self._lengths = context.shared(LengthBelief)
        self._running: dict[int, _Running] = {}  # by arrival index
        self._prefix_holders: Counter[GroupKey] = Counter()
        self._prefix_lens: dict[GroupKey, int] = {}
        self._prefix_tokens = 0
        self._peak: int | None = None  # as of the last start or end; None: not looked at since
        self._own_ends = 0  # Σ over running of the tokens each will hold by itself when it ends

    def prefill_room(self, view: ReplicaView, now_s: float) -> int:
        waiting = self._startable(view)
        head = next(waiting, None)
        left = view.step_tokens_max - view.decoding_count
        for sequence in view.prefilling:
            if head is not None and not view.ranks_before(sequence, head):
                break
            left -= sequence.total_len - sequence.computed_len
        if left <= 0 or head is None:
            return max(0, left)
        kv_left = self._kv_left(view, left)
        room = self._prompts_within(chain((head,), waiting), left, kv_left, view.block_tokens)
        return room if view.running_count else max(1, room)  # alone, anybody may start

    def compose(self, view: ReplicaView, now_s: float) -> Composition:
        return Composition(pieces(view.prefilling, view.step_tokens_max - view.decoding_count))

    def started(self, sequence: SequenceView, now_s: float) -> None:
        self._peak = None
        entry = self._entry_of(sequence)
        self._running[sequence.arrival_index] = entry
        self._own_ends += _own_end(entry)
        key = group_key(sequence)
        if key is not None and entry.shared_len:
            if key not in self._prefix_lens:
                self._prefix_lens[key] = entry.shared_len
                self._prefix_tokens += entry.shared_len
            self._prefix_holders[key] += 1

    def left(self, sequence: SequenceView, now_s: float) -> None:
        self._peak = None
        entry = self._running.pop(sequence.arrival_index)
        self._own_ends -= _own_end(entry)
        key = group_key(sequence)
        if key is not None and entry.shared_len:
            self._prefix_holders[key] -= 1
            if not self._prefix_holders[key]:
                del self._prefix_holders[key]
                self._prefix_tokens -= self._prefix_lens.pop(key)

    def _startable(self, view: ReplicaView) -> Iterator[SequenceView]:
        """Who waits, without those whose group's prefix is being computed: others start before them."""
        computing = {
            group_key(sequence)
            for sequence in view.prefilling
            if sequence.computed_len < sequence.request.shared_len
        }
        computing.discard(None)
        return (sequence for sequence in view.waiting if group_key(sequence) not in computing)

    def _entry_of(self, sequence: SequenceView) -> _Running:
        request = sequence.request
        shared_len = min(request.shared_len, request.prompt_len - 1) if request.group_id is not None else 0
        return _Running(sequence, shared_len, round(self._lengths.mean(sequence)))

    def _kv_left(self, view: ReplicaView, enough: int) -> int:
        """Tokens of the limit that are free at the coming peak; not looked at closely above `enough`."""
        limit = int(self._kv_frac * view.block_count * view.block_tokens)
        # A sequence's last block is half full on average.
        limit -= self._prefix_tokens + len(self._running) * view.block_tokens // 2
        if limit - self._own_ends > 2 * enough:
            return limit - self._own_ends
        if self._peak is None:
            self._peak = _peak_tokens(self._running.values())
        return limit - self._peak

    def _prompts_within(
        self, waiting: Iterable[SequenceView], left: int, kv_left: int, block_tokens: int
    ) -> int:
        """Prompt tokens of those at the head of the queue that end within `kv_left`, at most `left`."""
        room = 0
        for sequence in waiting:
            entry = self._entry_of(sequence)
            held = 0 if group_key(sequence) in self._prefix_lens else entry.shared_len
            own_len = sequence.total_len - entry.shared_len
            kv_left -= held + own_len + entry.growth + block_tokens // 2
            if kv_left < 0:
                break
            room += held + own_len
            if room >= left:
                break
        return min(room, left)


def _own_end(entry: _Running) -> int:
    """What it holds by itself at its expected end; from its maximum, so that it never changes."""
    request = entry.sequence.request
    return request.prompt_len - entry.shared_len + request.max_output_tokens


def _peak_tokens(running: Collection[_Running]) -> int:
    """The most tokens that these will ever hold by themselves, if each ends when expected."""
    held = [entry.sequence.total_len - entry.shared_len for entry in running]
    growth = [entry.growth for entry in running]
    return int(future_peak(np.array(held, np.int64), np.array([growth], np.int64))[0])
