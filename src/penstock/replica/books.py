"""What a replica knows of its sequences and its KV, and the moves that keep both consistent."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from penstock.core.events import Admitted, Finished, Preempted, ReplicaEvent
from penstock.core.reasons import FinishReason, MissReason, PinEvent, PreemptReason, WaitReason
from penstock.core.step import StepPlan
from penstock.core.units import ceil_div
from penstock.policies.rank import RankKey
from penstock.policies.stack import Stack
from penstock.policies.view import SequenceView
from penstock.replica.draft import PlanDraft
from penstock.replica.groups import GroupLeaders
from penstock.replica.kv_groups import make_pool
from penstock.replica.lane import DecodeLane
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaStats
from penstock.replica.pins import Pins
from penstock.replica.prefixes import Prefixes
from penstock.replica.sequence import Phase, Sequence
from penstock.replica.swapping import Swapping
from penstock.replica.waiting import WaitingQueue


class Books:
    """The state of a replica. It is itself the `ReplicaView` that its policies read.

    A move touches what changes: decoding sequences advance together in the lane, and only those that start,
    fill a block, or end are touched.
    """

    def __init__(self, limits: ReplicaLimits, stack: Stack) -> None:
        self.limits = limits
        self._stack = stack
        self._pool = make_pool(limits, stack.retain)
        self._pins = Pins(self._pool, stack.retain, stack.hooks["pinned"], stack.hooks["unpinned"])
        self._waiting = WaitingQueue(stack.rank)
        self._running: dict[int, Sequence] = {}  # by seq_id
        self._ranked: list[Sequence] | None = None  # `running` in rank order; None after a change
        self._prefilling: list[Sequence] = []  # in rank order
        self._lane = DecodeLane(limits.kv_block_tokens)
        self._group_leaders = GroupLeaders(limits)
        self._rank_version: int | None = None
        self._by_request: dict[str, Sequence] = {}
        self._sequences_seen = 0
        self._steps_planned = 0
        self._outstanding: StepPlan | None = None
        self._draft = PlanDraft()
        self._events: list[ReplicaEvent] = []  # delivered when the plan is completed
        self._standing_steps = 0  # how many more decode steps need no decision
        self._sitting_out: frozenset[int] = frozenset()  # decodes that no block was found for, by seq_id
        self._head_reason: WaitReason | None = None
        self._now_s = 0.0  # of the call in progress, for the ranks' keys
        self._stats = ReplicaStats(
            prefix_miss_tokens_total={reason.value: 0 for reason in MissReason},
            preempted_tokens_total={reason.value: 0 for reason in PreemptReason},
            pins_total=self._pins.counts,
        )
        self._prefixes = Prefixes(self._pool, limits, self._stats)
        self._swapping: Swapping | None = None  # where there is room in host memory
        if limits.host_kv_blocks and stack.preempt.swaps:
            self._swapping = Swapping(
                limits, self._pool, stack.preempt, self._draft, self._stats, self._rank_key
            )
        hooks = stack.hooks
        self._on_submitted, self._on_started = hooks["submitted"], hooks["started"]
        self._on_decoding, self._on_stepped = hooks["decoding"], hooks["stepped"]
        self._on_copied = hooks["copied"]
        self._on_left, self._on_finished = hooks["left"], hooks["finished"]
        self._steps_valid = hooks["steps_valid"]
        for attached in hooks["attached"]:
            attached(self)

    # ---- the window policies look through -------------------------------------------------------------

    @property
    def running(self) -> SequenceOf[Sequence]:
        if self._ranked is None:
            self._ranked = sorted(self._running.values(), key=self._rank_key)
        return self._ranked

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def slots_used(self) -> int:
        """By who runs, and by who will when its KV has come from the host."""
        return len(self._running) + (0 if self._swapping is None else len(self._swapping.loading))

    @property
    def waiting(self) -> Iterable[Sequence]:
        return self._waiting

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def outranks(self, head: SequenceView, other: SequenceView) -> bool:
        return self._stack.rank.outranks(head, other, self._now_s)

    @property
    def decode_clock(self) -> int:
        return self._lane.clock

    @property
    def decode_context(self) -> int:
        return self._lane.context

    @property
    def prefilling(self) -> SequenceOf[Sequence]:
        return self._prefilling

    def ranks_before(self, first: SequenceView, second: SequenceView) -> bool:
        assert isinstance(first, Sequence) and isinstance(second, Sequence)
        return self._rank_key(first) < self._rank_key(second)

    @property
    def decoding_count(self) -> int:
        return len(self._lane.members)

    @property
    def blocks_available(self) -> int:
        guarded = 0 if self._swapping is None else self._swapping.blocks_guarded
        return self._pool.available + guarded

    @property
    def blocks_pinned(self) -> int:
        return self._pins.block_count

    @property
    def block_count(self) -> int:
        return self.limits.kv_blocks

    @property
    def block_tokens(self) -> int:
        return self.limits.kv_block_tokens

    @property
    def step_tokens_max(self) -> int:
        return self.limits.step_tokens_max

    @property
    def running_max(self) -> int:
        return self.limits.running_max

    # ---- what anybody may ask -------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._by_request) or (self._swapping is not None and self._swapping.is_busy)

    @property
    def steps_planned(self) -> int:
        return self._steps_planned

    def stats(self) -> ReplicaStats:
        """The live counters, brought up to date. O(1); copy it to keep it."""
        stats = self._stats
        stats.running = len(self._running)
        stats.waiting = len(self._waiting)
        stats.waiting_tokens = self._waiting.total_tokens
        stats.waiting_by_reason = self._waiting_by_reason()
        stats.kv_blocks_free = self._pool.free_count
        stats.kv_blocks_cached = self._pool.parked_count
        stats.kv_blocks_used = self._pool.held_count
        if self._swapping is not None:
            self._count_swapping(self._swapping, stats)
        stats.kv_blocks_pinned = self._pins.block_count
        stats.pins = len(self._pins)
        return stats

    def _count_swapping(self, swapping: Swapping, stats: ReplicaStats) -> None:
        """Who is loaded waits, for a copy."""
        stats.host_kv_blocks_used = swapping.host_used
        if loading := len(swapping.loading):
            reasons = stats.waiting_by_reason
            stats.waiting += loading
            stats.waiting_tokens += sum(sequence.total_len for sequence in swapping.loading.values())
            copying = WaitReason.KV_COPY.value
            stats.waiting_by_reason = {**reasons, copying: reasons.get(copying, 0) + loading}

    def check_invariants(self) -> None:
        """Raises AssertionError. O(sequences + blocks); tests call it after every step."""
        running = list(self._running.values())
        held = (sequence.blocks for sequence in running)
        loading = [] if self._swapping is None else list(self._swapping.loading.values())
        copied = [] if self._swapping is None else self._swapping.holders()
        self._pool.check_invariants([*held, *copied, *self._pins.holds(), *self._other_holders()])
        if self._swapping is not None:
            self._swapping.check_invariants()
        self._pins.check_invariants(self._now_s)
        self._lane.check_invariants()
        assert len(running) + len(loading) <= self.limits.running_max
        assert set(self._by_request.values()) == {*running, *loading, *self._waiting}
        places = len(running) + len(loading) + len(self._waiting)
        assert len(self._by_request) == places, "in exactly one place"
        assert {*self._lane.members.values(), *self._prefilling} == set(running)
        assert len(self._lane.members) + len(self._prefilling) == len(running)
        for sequence in running:
            assert sequence.running and sequence.output_left >= 1
            assert sequence.computed_len < sequence.total_len
            assert sequence.computed_len <= len(sequence.blocks) * self.block_tokens
            assert not sequence.output or len(sequence.output) == sequence.output_len
        for sequence in self._waiting:
            assert not sequence.running and not sequence.blocks and sequence.computed_len == 0

    def _other_holders(self) -> list[list[int]]:
        """Blocks that neither a running sequence nor a pin holds, and that are not free either."""
        return []

    # ---- moves ----------------------------------------------------------------------------------------

    def _rank_key(self, sequence: Sequence) -> tuple[RankKey, int]:
        return (self._stack.rank.key(sequence, self._now_s), sequence.arrival_index)

    def _start(
        self,
        sequence: Sequence,
        cached_blocks: list[int],
        reserve_len: int,
        now_s: float,
        restored_len: int = 0,
    ) -> None:
        """It gets KV: found blocks, and fresh ones; where the host has more, that is copied back first."""
        resumed = sequence.phase is Phase.PREEMPTED
        cached_len = len(cached_blocks) * self.block_tokens
        if not resumed:
            if sequence.request.program is not None:
                self._pins.hit(sequence.request.program)
            sequence.cached_len = max(cached_len, restored_len)
            self._prefixes.count(sequence, sequence.cached_len)
        self._waiting.remove(sequence)
        self._pool.share(cached_blocks)
        fresh = ceil_div(reserve_len, self.block_tokens) - len(cached_blocks)
        sequence.blocks = cached_blocks + self._pool.allocate(max(0, fresh), now_s, sequence.seq_id)
        sequence.published_blocks = len(cached_blocks)
        sequence.computed = max(cached_len, restored_len)
        self._events.append(Admitted(sequence.request.id, now_s, cached_len, resumed))
        if not self._load(sequence, len(cached_blocks), restored_len, now_s):
            self._enter_running(sequence, now_s)

    def _load(self, sequence: Sequence, cached_blocks: int, restored_len: int, now_s: float) -> bool:
        """Have the host's KV copied into the sequence's blocks; whether it must wait for that."""
        if self._swapping is None:
            return False
        if restored_len <= cached_blocks * self.block_tokens:
            self._swapping.started(sequence)
            return False
        return self._swapping.load(sequence, cached_blocks, restored_len, self, now_s)

    def _enter_running(self, sequence: Sequence, now_s: float) -> None:
        sequence.running = True
        sequence.enter(Phase.PREFILL if sequence.first_token_s is None else Phase.DECODE, now_s)
        self._running[sequence.seq_id] = sequence
        self._group_leaders.started(sequence)
        self._ranked = None
        bisect.insort(self._prefilling, sequence, key=self._rank_key)
        self._draft.start(sequence)
        for hook in self._on_started:
            hook(sequence, now_s)

    def _secure_decodes(self, now_s: float) -> None:
        """A block for every decode whose last one is full; where there are too few, somebody yields."""
        self._sitting_out = frozenset()
        edge = self._lane.at_edge()
        if not edge:
            return
        clock, block_tokens = self._lane.clock, self.limits.kv_block_tokens
        needy = [s for s in edge.values() if len(s.blocks) * block_tokens == clock + s.offset]
        if len(needy) <= self._pool.available:
            if self._pool.in_groups:
                for sequence in needy:
                    self._give(sequence, 1, now_s)
                return
            for sequence, block in zip(needy, self._pool.allocate(len(needy), now_s), strict=True):
                sequence.blocks.append(block)
                self._draft.give(sequence, [block])
            return
        self._secure_needy(sorted(needy, key=self._rank_key), now_s)

    def _secure_needy(self, needy: list[Sequence], now_s: float) -> None:
        """In rank order, with too few blocks for all: somebody yields, or they sit out."""
        without = {sequence.seq_id for sequence in needy}
        for sequence in needy:
            if not sequence.running:
                continue
            others_move = bool(self._lane.members.keys() - without)
            short = not self._pool.available and others_move
            if short and self._stack.preempt.sits_out(sequence, self, now_s):
                continue
            if self._secure(sequence, sequence.computed_len + 1, now_s):
                without.discard(sequence.seq_id)
        self._sitting_out = frozenset(without & self._lane.members.keys())

    def _secure(self, sequence: Sequence, length: int, now_s: float) -> bool:
        """Give `sequence` blocks for `length` tokens, preempting where needed; False if it had to yield."""
        missing = ceil_div(length, self.block_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self.blocks_available:
            if len(self._running) == 1 and self._pins.sacrifice(now_s, sequence.request.program):
                continue
            victim = self._stack.preempt.victim(sequence, self, now_s)
            assert isinstance(victim, Sequence) and victim.running
            self._preempt(victim, sequence, PreemptReason.KV_EXHAUSTED, now_s)
            if victim is sequence:
                return False
        if missing > self._pool.available and self._swapping is not None:
            self._swapping.take_guarded(missing, now_s)
        self._give(sequence, missing, now_s)
        return True

    def _give(self, sequence: Sequence, count: int, now_s: float) -> None:
        blocks = self._pool.allocate(count, now_s, sequence.seq_id)
        sequence.blocks += blocks
        self._draft.give(sequence, blocks)

    def _preempt(self, victim: Sequence, needy: Sequence, reason: PreemptReason, now_s: float) -> None:
        lost = victim.computed_len
        if self._swapping is not None:
            lost -= self._swapping.out(victim, self, now_s)
        self._leave_running(victim, now_s)
        victim.enter(Phase.PREEMPTED, now_s)
        self._waiting.add(victim, now_s)
        self._stats.preemptions_total += 1
        self._stats.preempted_tokens_total[reason.value] += lost
        self._events.append(Preempted(victim.request.id, now_s, reason, lost, needy.request.id))

    def _leave_running(self, sequence: Sequence, now_s: float) -> None:
        """Give everything back; the executor forgets the sequence with the next plan."""
        self._group_leaders.left(sequence)
        if sequence.lane is None:
            self._prefilling.remove(sequence)
        else:
            self._lane.leave(sequence)
        self._release_kv(sequence, now_s)
        sequence.prompt_logprobs = []
        sequence.running = False
        del self._running[sequence.seq_id]
        self._ranked = None
        self._draft.end(sequence)
        self._standing_steps = 0
        for hook in self._on_left:
            hook(sequence, now_s)

    def _release_kv(self, sequence: Sequence, now_s: float) -> None:
        """Its blocks go back to the pool; nothing of it is computed any more."""
        self._pool.release(sequence.blocks, sequence.published_blocks, sequence.request, now_s)
        self._pool.drop_tail(sequence.seq_id)
        sequence.blocks = []
        sequence.computed = sequence.published_blocks = 0

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now_s: float,
        *,
        stop_token_id: int | None = None,
        detail: str | None = None,
    ) -> Finished:
        """The one last event. The caller has taken a waiting sequence out of the queue."""
        is_answered = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if self._swapping is not None:
            if is_answered:
                self._swapping.turn_ended(sequence)
            else:
                self._swapping.forget(sequence)
        if sequence.running:
            if is_answered:
                self._end_turn(sequence, now_s)
            self._leave_running(sequence, now_s)
        sequence.enter(sequence.phase, now_s)
        for hook in self._on_finished:
            hook(sequence, reason, now_s)
        del self._by_request[sequence.request.id]
        return Finished(
            sequence.request.id,
            now_s,
            reason,
            sequence.request.prompt_len,
            sequence.output_len,
            sequence.cached_len,
            sequence.phases,
            stop_token_id,
            detail,
            sequence.first_token_s,
        )

    def _end_turn(self, sequence: Sequence, now_s: float) -> None:
        """Its program's older pin goes, and what it leaves is pinned where the policy says so."""
        request = sequence.request
        if request.program is None or not self._stack.retain.pins:
            return
        until_s = None if request.is_last_turn else self._stack.retain.turn_ended(sequence, self, now_s)
        blocks = [] if until_s is None else self._prefixes.published_blocks(sequence)
        self._pins.end(request.program, PinEvent.REPLACED, now_s)
        if until_s is not None and blocks:
            self._pins.make(request.program, blocks, (sequence.arrival_index, request), until_s, now_s)

    def _waiting_by_reason(self) -> dict[str, int]:
        waiting = len(self._waiting)
        if not waiting:
            return {}
        head = (self._head_reason or WaitReason.STEP_BUDGET).value
        behind = {WaitReason.BEHIND_HEAD.value: waiting - 1} if waiting > 1 else {}
        return {head: 1, **behind}
