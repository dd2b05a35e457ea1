"""The step loop of one replica: rank, admit, compose a step, account KV, and turn results into events.

    submit / cancel ─► plan(now) ─► executor.execute(plan) ─► complete(plan, result, now) ─► events

Pure: no clock, no I/O, no torch. The engine process and the twin drive the same object; given the same
calls it makes the same plans.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as SequenceOf

from penstock.core.events import Admitted, Finished, Preempted, ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason, FinishReason, MissReason, PreemptReason, WaitReason
from penstock.core.request import Request
from penstock.core.step import Chunk, SequenceStart, StepPlan, StepResult
from penstock.core.units import ceil_div
from penstock.policies.compose import Composition
from penstock.policies.rank import RankKey
from penstock.policies.stack import Stack
from penstock.policies.view import Candidate
from penstock.replica.kv_pool import KVPool
from penstock.replica.lane import DecodeLane
from penstock.replica.limits import ReplicaLimits, check_feasible
from penstock.replica.messages import ReplicaStats
from penstock.replica.sequence import Phase, Sequence
from penstock.replica.waiting import WaitingQueue

_Ends = dict[int, tuple[FinishReason, int | None]]  # seq_id → why, and the stop token if one was drawn


class Replica:
    """Decides every step of one replica. It is itself the `ReplicaView` that its policies read.

    A step costs what changes: decoding sequences advance together in the lane, and only those that start,
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
        # Gathered while a plan is made, and handed over with it
        self._starts: dict[int, SequenceStart] = {}
        self._ends: list[int] = []
        self._new_blocks: list[tuple[int, list[int]]] = []
        self._events: list[ReplicaEvent] = []  # delivered when the plan is completed
        self._standing_steps = 0  # how many more decode steps need no decision
        self._head_reason: WaitReason | None = None
        self._now_s = 0.0  # of the call in progress, for the ranks' keys
        self._stats = ReplicaStats(
            prefix_miss_tokens_total={reason.value: 0 for reason in MissReason},
            preempted_tokens_total={reason.value: 0 for reason in PreemptReason},
        )

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

    # ---- what the host calls --------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._by_request)

    @property
    def steps_planned(self) -> int:
        return self._steps_planned

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises RequestError if it could never run; ids are unique."""
        assert request.id not in self._by_request, f"request id {request.id} is in use"
        check_feasible(request, self.limits)
        sequence = Sequence(self._sequences_seen, request, now_s)
        self._sequences_seen += 1
        self._by_request[request.id] = sequence
        self._waiting.add(sequence, now_s)
        self._standing_steps = 0

    def cancel(self, request_id: str, reason: CancelReason, now_s: float) -> Finished | None:
        """End a request, queued or running; None if it is not here (any more). Its KV may stay as prefix."""
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return None
        if not sequence.running:
            self._waiting.remove(sequence)
            self._standing_steps = 0  # whom it held up may start with the next step
        finish = FinishReason.STOP if reason is CancelReason.STOP_STRING else FinishReason.CANCELLED
        return self._finish(sequence, finish, now_s, detail=reason.value)

    def fail_all(self, detail: str, now_s: float) -> list[Finished]:
        """The executor broke: answer everything here as failed."""
        self._outstanding = None
        failed = []
        for sequence in list(self._by_request.values()):
            if not sequence.running:
                self._waiting.remove(sequence)
            failed.append(self._finish(sequence, FinishReason.FAILED, now_s, detail=detail))
        return failed

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when there is nothing to do. Each plan is completed before the next."""
        assert self._outstanding is None, "complete the last plan first"
        self._now_s = now_s
        if self._standing_steps > 0 and self._stack.rank.version(now_s) == self._rank_version:
            plan: StepPlan | None = self._plan_again(now_s)
        else:
            plan = self._plan_afresh(now_s)
        self._outstanding = plan
        return plan

    def complete(self, plan: StepPlan, result: StepResult, now_s: float) -> list[ReplicaEvent]:
        """Account the executed plan. Events: admissions, preemptions, tokens, ends."""
        assert plan is self._outstanding, "plans are completed in order, once"
        assert 1 <= result.steps <= plan.repeat
        self._outstanding = None
        self._now_s = now_s
        # Who was cancelled while the step ran has been told its last event
        events: list[ReplicaEvent] = [e for e in self._events if e.request_id in self._by_request]
        self._events = []
        ends: _Ends = {}
        if plan.decode_count:
            self._advance_decodes(plan, result, events, ends, now_s)
        for chunk in plan.chunks:
            sequence = self._running.get(chunk.seq_id)
            if sequence is not None:  # else it was cancelled while the step ran
                self._advance_chunk(sequence, chunk, result, events, ends, now_s)
        # In order of arrival, so that it does not matter how an end was found
        for seq_id, (reason, stop_token_id) in sorted(ends.items()):
            sequence = self._running[seq_id]
            events.append(self._finish(sequence, reason, now_s, stop_token_id=stop_token_id))
        stats = self._stats
        stats.step_index = plan.index + result.steps - 1
        stats.step_tokens = plan.token_count
        stats.step_s = result.duration_s
        return events

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

    # ---- making a plan --------------------------------------------------------------------------------

    def _plan_afresh(self, now_s: float) -> StepPlan | None:
        self._refresh_ranks(now_s)
        preempted_before = self._stats.preemptions_total
        self._secure_decodes(now_s)
        if self._waiting and self._stats.preemptions_total == preempted_before:
            self._admit_waiting(now_s)
        if not self._running:
            assert not self._waiting, "a policy admits the head of the queue when nothing runs"
            self._events.clear()
            return None
        composition = self._stack.compose.compose(self, now_s)
        chunks = self._chunks(composition, now_s)
        paused = self._paused(composition)
        decode_count = len(self._lane.members) - len(paused) if composition.decode else 0
        assert chunks or decode_count, "a step computes something while something runs"
        plan = self._make_plan(chunks, decode_count, paused)
        # Where somebody had to yield, the next plan may admit again.
        if not chunks and not paused and self._stats.preemptions_total == preempted_before:
            plan.repeat = self._steps_without_decision()
        self._standing_steps = plan.repeat - 1
        return plan

    def _plan_again(self, now_s: float) -> StepPlan:
        """One more step of the standing decode plan: only full blocks need something."""
        self._secure_decodes(now_s)
        plan = self._make_plan([], len(self._lane.members), frozenset())
        plan.repeat = self._standing_steps
        self._standing_steps -= 1
        return plan

    def _make_plan(self, chunks: list[Chunk], decode_count: int, paused: frozenset[int]) -> StepPlan:
        new_blocks, self._new_blocks = self._new_blocks, []
        if self._ends:  # perhaps preempted after they were given blocks
            new_blocks = [entry for entry in new_blocks if entry[0] in self._running]
        starts, self._starts = list(self._starts.values()), {}
        ends, self._ends = self._ends, []
        plan = StepPlan(self._steps_planned, chunks, decode_count, paused, starts, ends, new_blocks)
        self._steps_planned += 1
        return plan

    def _steps_without_decision(self) -> int:
        """For how many decode steps nobody ends for sure, and the blocks last without preemption."""
        if not self.limits.repeat:
            return 1
        return self._lane.edges_within(self._lane.steps_to_finish(), self._pool.available)

    def _refresh_ranks(self, now_s: float) -> None:
        self._waiting.refresh(now_s)
        version = self._stack.rank.version(now_s)
        if version != self._rank_version:
            self._rank_version = version
            self._ranked = None
            self._prefilling.sort(key=self._rank_key)

    def _rank_key(self, sequence: Sequence) -> tuple[RankKey, int]:
        return (self._stack.rank.key(sequence, self._now_s), sequence.arrival_index)

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
                self._new_blocks.append((sequence.seq_id, [block]))
            return
        needy.sort(key=self._rank_key)
        for sequence in needy:
            if sequence.running:
                self._secure(sequence, sequence.computed_len + 1, now_s)

    def _admit_waiting(self, now_s: float) -> None:
        room = self._stack.compose.prefill_room(self, now_s)
        self._head_reason = None
        passed = 0  # siblings that wait for their leader hold up nobody else
        while passed < len(self._waiting):
            sequence = self._waiting.at(passed)
            if self._waits_for_leader(sequence):
                self._head_reason = self._head_reason or WaitReason.LEADER
                passed += 1
                continue
            reason, computed = self._try_admit(sequence, room, now_s)
            if reason is not None:
                self._head_reason = reason
                return
            room -= computed

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether a sibling that ranks before it is still computing the prompt both share."""
        leader = self._by_request.get(sequence.request.leader_id or "")
        if leader is None or not self.limits.prefix_cache or leader.output_len:
            return False
        return leader.arrival_index < sequence.arrival_index

    def _try_admit(self, sequence: Sequence, room: int, now_s: float) -> tuple[WaitReason | None, int]:
        """Start `sequence` and say how many tokens it must compute, or say why it waits."""
        if len(self._running) >= self.limits.running_max:
            return WaitReason.SLOTS, 0
        if room <= 0:
            return WaitReason.STEP_BUDGET, 0
        cached_blocks = self._cached_blocks(sequence)
        cached_len = len(cached_blocks) * self.block_tokens
        revived = self._pool.parked_among(cached_blocks)
        candidate = Candidate(sequence, cached_len, len(cached_blocks), revived)
        admission = self._stack.admit.decide(candidate, self, now_s)
        if admission.reason is not None:
            return admission.reason, 0
        self._start(sequence, cached_blocks, admission.reserve_len, now_s)
        return None, sequence.total_len - cached_len

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest known prefix. At least one token is left to compute, to sample from.

        None where every prompt position must be scored: cached positions yield no logits.
        """
        if not self.limits.prefix_cache or not sequence.is_keyed or sequence.request.sampling.prompt_logprobs:
            return []
        full_blocks = (sequence.total_len - 1) // self.block_tokens
        return self._pool.match(sequence.key_blocks(full_blocks, self.block_tokens))

    def _start(self, sequence: Sequence, cached_blocks: list[int], reserve_len: int, now_s: float) -> None:
        resumed = sequence.phase is Phase.PREEMPTED
        cached_len = len(cached_blocks) * self.block_tokens
        if not resumed:
            sequence.cached_len = cached_len
            self._count_prefix(sequence, cached_len)
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
        self._starts[sequence.seq_id] = _start_message(sequence)
        self._events.append(Admitted(sequence.request.id, now_s, cached_len, resumed))

    def _count_prefix(self, sequence: Sequence, cached_len: int) -> None:
        stats = self._stats
        total_len = sequence.total_len
        stats.prefix_query_tokens_total += total_len
        stats.prefix_hit_tokens_total += cached_len
        reason = MissReason.NEW
        missed_block = cached_len // self.block_tokens
        if sequence.is_keyed and missed_block < (total_len - 1) // self.block_tokens:
            keys = sequence.key_blocks(missed_block + 1, self.block_tokens)
            if missed_block < len(keys) and self._pool.was_evicted(keys[missed_block]):
                reason = MissReason.EVICTED
        stats.prefix_miss_tokens_total[reason.value] += total_len - cached_len

    def _chunks(self, composition: Composition, now_s: float) -> list[Chunk]:
        """Shares with their KV secured; a share whose sequence had to yield drops out."""
        chunks: list[Chunk] = []
        preempted_before = self._stats.preemptions_total
        for share in composition.shares:
            sequence, count = share.sequence, share.count
            assert isinstance(sequence, Sequence) and count >= 1
            start = sequence.computed
            if sequence.running and self._secure(sequence, start + count, now_s):
                chunks.append(Chunk(sequence.seq_id, start, count, start + count == sequence.known_len))
        if self._stats.preemptions_total == preempted_before:
            return chunks
        return [chunk for chunk in chunks if chunk.seq_id in self._running]

    def _paused(self, composition: Composition) -> frozenset[int]:
        if not composition.paused:
            return frozenset()
        chosen = {sequence.arrival_index for sequence in composition.paused}  # equals the seq_id
        return frozenset(chosen & self._lane.members.keys())

    def _secure(self, sequence: Sequence, length: int, now_s: float) -> bool:
        """Give `sequence` blocks for `length` tokens, preempting where needed; False if it had to yield."""
        missing = ceil_div(length, self.block_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self._pool.available:
            victim = self._stack.preempt.victim(sequence, self, now_s)
            assert isinstance(victim, Sequence) and victim.running
            self._preempt(victim, sequence, now_s)
            if victim is sequence:
                return False
        blocks = self._pool.allocate(missing, now_s)
        sequence.blocks += blocks
        self._new_blocks.append((sequence.seq_id, blocks))
        return True

    def _preempt(self, victim: Sequence, needy: Sequence, now_s: float) -> None:
        lost = victim.computed_len
        reason = PreemptReason.KV_EXHAUSTED
        self._leave_running(victim, now_s)
        victim.enter(Phase.PREEMPTED, now_s)
        self._waiting.add(victim, now_s)
        self._stats.preemptions_total += 1
        self._stats.preempted_tokens_total[reason.value] += lost
        self._events.append(Preempted(victim.request.id, now_s, reason, lost, needy.request.id))

    # ---- taking results -------------------------------------------------------------------------------

    def _advance_decodes(
        self, plan: StepPlan, result: StepResult, events: list[ReplicaEvent], ends: _Ends, now_s: float
    ) -> None:
        """The lane moves on by `result.steps`."""
        lane = self._lane
        for seq_id in plan.paused:
            if seq_id in lane.members:
                lane.pause(lane.members[seq_id])
        for step in range(result.steps):
            if step:  # the first step's blocks came with the plan
                self._secure_decodes(now_s)
            lane.clock += 1
            for sequence in lane.at_edge().values():
                if sequence.is_keyed:
                    self._publish_full_blocks(sequence)
        self._standing_steps = max(0, self._standing_steps - (result.steps - 1))
        if result.tokens is not None:
            for seq_id, sequence in lane.members.items():
                if seq_id not in plan.paused:
                    self._take_token(sequence, result.tokens[seq_id], result, events, ends)
        for seq_id in result.stopped:
            if seq_id in lane.members:
                ends[seq_id] = (FinishReason.STOP, None)
        for sequence in lane.finished():
            ends.setdefault(sequence.seq_id, (FinishReason.LENGTH, None))

    def _advance_chunk(
        self,
        sequence: Sequence,
        chunk: Chunk,
        result: StepResult,
        events: list[ReplicaEvent],
        ends: _Ends,
        now_s: float,
    ) -> None:
        """A chunk has KV now; the last one of a prompt yields a token and begins the decode."""
        sequence.computed += chunk.count
        if sequence.is_keyed:
            self._publish_full_blocks(sequence)
        if result.prompt_logprobs:
            sequence.prompt_logprobs += result.prompt_logprobs.get(sequence.seq_id, ())
        if not chunk.emits:
            return
        self._prefilling.remove(sequence)
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            sequence.enter(Phase.DECODE, now_s)
        sequence.known_len += 1
        self._lane.join(sequence)
        if result.tokens is not None:
            self._take_token(sequence, result.tokens[sequence.seq_id], result, events, ends)
        elif sequence.seq_id in result.stopped:
            ends[sequence.seq_id] = (FinishReason.STOP, None)
        if sequence.output_left == 0:
            ends.setdefault(sequence.seq_id, (FinishReason.LENGTH, None))

    def _take_token(
        self,
        sequence: Sequence,
        token_id: int,
        result: StepResult,
        events: list[ReplicaEvent],
        ends: _Ends,
    ) -> None:
        """Tell the world of the token, or note the end it means. A stop token is counted, but not told."""
        sequence.output.append(token_id)
        if token_id in sequence.request.stop_token_ids:
            ends[sequence.seq_id] = (FinishReason.STOP, token_id)
        else:
            events.append(_token_event(sequence, token_id, result, self._now_s))

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        """Offer blocks that this step filled to the prefix index."""
        if not self.limits.prefix_cache:
            return
        full_blocks = sequence.computed_len // self.block_tokens
        if full_blocks == sequence.published_blocks:
            return
        keys = sequence.key_blocks(full_blocks, self.block_tokens)
        for index in range(sequence.published_blocks, len(keys)):
            self._pool.publish(sequence.blocks[index], keys[index])
        sequence.published_blocks = len(keys)

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
        if self._starts.pop(sequence.seq_id, None) is None:
            self._ends.append(sequence.seq_id)
        self._standing_steps = 0

    def _waiting_by_reason(self) -> dict[str, int]:
        waiting = len(self._waiting)
        if not waiting:
            return {}
        head = (self._head_reason or WaitReason.STEP_BUDGET).value
        behind = {WaitReason.BEHIND_HEAD.value: waiting - 1} if waiting > 1 else {}
        return {head: 1, **behind}


def _start_message(sequence: Sequence) -> SequenceStart:
    request = sequence.request
    return SequenceStart(
        seq_id=sequence.seq_id,
        request_id=request.id,
        tokens=sequence.tokens(),
        prompt_len=request.prompt_len,
        total_len=sequence.total_len,
        cached_len=sequence.computed_len,
        blocks=tuple(sequence.blocks),
        sampling=request.sampling,
        min_output_tokens=request.min_output_tokens,
        stop_token_ids=request.stop_token_ids,
    )


def _token_event(sequence: Sequence, token_id: int, result: StepResult, now_s: float) -> TokenOut:
    event = TokenOut(sequence.request.id, now_s, token_id)
    if result.logprobs:
        event.logprobs = result.logprobs.get(sequence.seq_id)
    if sequence.prompt_logprobs and sequence.output_len == 1:
        event.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
    return event
