"""What a replica knows of its sequences and its KV, and the moves that keep both consistent."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from penstock.core.events import Admitted, Finished, Preempted, ReplicaEvent
from penstock.core.reasons import FinishReason, MissReason, PreemptReason, WaitReason
from penstock.core.step import StepPlan
from penstock.core.units import ceil_div
from penstock.policies.rank import RankKey
from penstock.policies.stack import Stack
from penstock.replica.draft import PlanDraft
from penstock.replica.kv_pool import KVPool
from penstock.replica.lane import DecodeLane
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaStats
from penstock.replica.prefixes import Prefixes
from penstock.replica.sequence import Phase, Sequence
from penstock.replica.waiting import WaitingQueue


class Books:
    """The state of a replica. It is itself the `ReplicaView` that its policies read.

    A move touches what changes: decoding sequences advance together in the lane, and only those that start,
    fill a block, or end are touched.
    """

    def __init__(self, limits: ReplicaLimits, stack: Stack) -> None:
        self.limits = limits
        self._stack = stack
        self._pool = KVPool(limits.kv_blocks, limits.kv_block_tokens, stack.retain)
        self._waiting = WaitingQueue(stack.rank)
        self._running: dict[int, Sequence] = {}  # by seq_id
        self._ranked: list[Sequence] | None = None  # `running` in rank order; None after a change
        self._prefilling: list[Sequence] = []  # in rank order
        self._lane = DecodeLane(limits.kv_block_tokens)
        self._rank_version: int | None = None
        self._by_request: dict[str, Sequence] = {}
        self._sequences_seen = 0
        self._steps_planned = 0
        self._outstanding: StepPlan | None = None
        self._draft = PlanDraft()
        self._events: list[ReplicaEvent] = []  # delivered when the plan is completed
        self._standing_steps = 0  # how many more decode steps need no decision
        self._head_reason: WaitReason | None = None
        self._now_s = 0.0  # of the call in progress, for the ranks' keys
        self._stats = ReplicaStats(
            prefix_miss_tokens_total={reason.value: 0 for reason in MissReason},
            preempted_tokens_total={reason.value: 0 for reason in PreemptReason},
        )
        self._prefixes = Prefixes(self._pool, limits, self._stats)
        hooks = stack.hooks
        self._on_submitted, self._on_started = hooks["submitted"], hooks["started"]
        self._on_decoding, self._on_stepped = hooks["decoding"], hooks["stepped"]
        self._on_left, self._on_finished = hooks["left"], hooks["finished"]
        self._steps_valid = hooks["steps_valid"]

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
    def waiting(self) -> Iterable[Sequence]:
        return self._waiting

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def decode_clock(self) -> int:
        return self._lane.clock

    @property
    def decode_context(self) -> int:
        return self._lane.context

    @property
    def prefilling(self) -> SequenceOf[Sequence]:
        return self._prefilling

    @property
    def decoding_count(self) -> int:
        return len(self._lane.members)

    @property
    def blocks_available(self) -> int:
        return self._pool.available

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
        return bool(self._by_request)

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
        return stats

    def check_invariants(self) -> None:
        """Raises AssertionError. O(sequences + blocks); tests call it after every step."""
        running = list(self._running.values())
        self._pool.check_invariants([sequence.blocks for sequence in running])
        self._lane.check_invariants()
        assert len(running) <= self.limits.running_max
        assert set(self._by_request.values()) == {*running, *self._waiting}
        assert len(self._by_request) == len(running) + len(self._waiting), "in exactly one place"
        assert {*self._lane.members.values(), *self._prefilling} == set(running)
        assert len(self._lane.members) + len(self._prefilling) == len(running)
        for sequence in running:
            assert sequence.running and sequence.output_left >= 1
            assert sequence.computed_len < sequence.total_len
            assert sequence.computed_len <= len(sequence.blocks) * self.block_tokens
            assert not sequence.output or len(sequence.output) == sequence.output_len
        for sequence in self._waiting:
            assert not sequence.running and not sequence.blocks and sequence.computed_len == 0

    # ---- moves ----------------------------------------------------------------------------------------

    def _rank_key(self, sequence: Sequence) -> tuple[RankKey, int]:
        return (self._stack.rank.key(sequence, self._now_s), sequence.arrival_index)

    def _start(self, sequence: Sequence, cached_blocks: list[int], reserve_len: int, now_s: float) -> None:
        resumed = sequence.phase is Phase.PREEMPTED
        cached_len = len(cached_blocks) * self.block_tokens
        if not resumed:
            sequence.cached_len = cached_len
            self._prefixes.count(sequence, cached_len)
        self._waiting.remove(sequence)
        self._pool.share(cached_blocks)
        fresh = ceil_div(reserve_len, self.block_tokens) - len(cached_blocks)
        sequence.blocks = cached_blocks + self._pool.allocate(max(0, fresh), now_s)
        sequence.published_blocks = len(cached_blocks)
        sequence.computed = cached_len
        sequence.running = True
        sequence.enter(Phase.PREFILL if sequence.first_token_s is None else Phase.DECODE, now_s)
        self._running[sequence.seq_id] = sequence
        self._ranked = None
        bisect.insort(self._prefilling, sequence, key=self._rank_key)
        self._draft.start(sequence)
        for hook in self._on_started:
            hook(sequence, now_s)
        self._events.append(Admitted(sequence.request.id, now_s, cached_len, resumed))

    def _secure_decodes(self, now_s: float) -> None:
        """A block for every decode whose last one is full; where there are too few, somebody yields."""
        edge = self._lane.at_edge()
        if not edge:
            return
        clock, block_tokens = self._lane.clock, self.limits.kv_block_tokens
        needy = [s for s in edge.values() if len(s.blocks) * block_tokens == clock + s.offset]
        if len(needy) <= self._pool.available:
            for sequence, block in zip(needy, self._pool.allocate(len(needy), now_s), strict=True):
                sequence.blocks.append(block)
                self._draft.give(sequence, [block])
            return
        needy.sort(key=self._rank_key)
        for sequence in needy:
            if sequence.running:
                self._secure(sequence, sequence.computed_len + 1, now_s)

    def _secure(self, sequence: Sequence, length: int, now_s: float) -> bool:
        """Give `sequence` blocks for `length` tokens, preempting where needed; False if it had to yield."""
        missing = ceil_div(length, self.block_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self._pool.available:
            victim = self._stack.preempt.victim(sequence, self, now_s)
            assert isinstance(victim, Sequence) and victim.running
            self._preempt(victim, sequence, PreemptReason.KV_EXHAUSTED, now_s)
            if victim is sequence:
                return False
        blocks = self._pool.allocate(missing, now_s)
        sequence.blocks += blocks
        self._draft.give(sequence, blocks)
        return True

    def _preempt(self, victim: Sequence, needy: Sequence, reason: PreemptReason, now_s: float) -> None:
        lost = victim.computed_len
        self._leave_running(victim, now_s)
        victim.enter(Phase.PREEMPTED, now_s)
        self._waiting.add(victim, now_s)
        self._stats.preemptions_total += 1
        self._stats.preempted_tokens_total[reason.value] += lost
        self._events.append(Preempted(victim.request.id, now_s, reason, lost, needy.request.id))

    def _leave_running(self, sequence: Sequence, now_s: float) -> None:
        """Give everything back; the executor forgets the sequence with the next plan."""
        if sequence.lane is None:
            self._prefilling.remove(sequence)
        else:
            self._lane.leave(sequence)
        self._pool.release(sequence.blocks, sequence.published_blocks, sequence.request, now_s)
        sequence.blocks = []
        sequence.computed = sequence.published_blocks = 0
        sequence.prompt_logprobs = []
        sequence.running = False
        del self._running[sequence.seq_id]
        self._ranked = None
        self._draft.end(sequence)
        self._standing_steps = 0
        for hook in self._on_left:
            hook(sequence, now_s)

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
        if sequence.running:
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

    def _waiting_by_reason(self) -> dict[str, int]:
        waiting = len(self._waiting)
        if not waiting:
            return {}
        head = (self._head_reason or WaitReason.STEP_BUDGET).value
        behind = {WaitReason.BEHIND_HEAD.value: waiting - 1} if waiting > 1 else {}
        return {head: 1, **behind}
