"""The step loop of one replica: rank, admit, compose a step, account KV, and turn results into events.

    submit / cancel ─► plan(now) ─► executor.execute(plan) ─► complete(plan, result, now) ─► events

Pure: no clock, no I/O, no torch. The engine process and the twin drive the same object; given the same
calls it makes the same plans.
"""

from __future__ import annotations

from dataclasses import replace

from penstock.core.events import Finished
from penstock.core.reasons import CancelReason, FinishReason, PinEvent, PreemptReason, WaitReason
from penstock.core.request import Request
from penstock.core.step import Chunk, StepPlan
from penstock.policies.compose import Composition
from penstock.policies.view import Candidate, Refusal
from penstock.replica.limits import check_feasible
from penstock.replica.messages import Advice, ProgramLeft
from penstock.replica.results import Results
from penstock.replica.sequence import Sequence
from penstock.replica.swapping import Swapping


class Replica(Results):
    """Decides every step of one replica. A step costs what changes."""

    # ---- what the host calls; `complete` is in `Results` ----------------------------------------------

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises RequestError if it could never run; ids are unique."""
        assert request.id not in self._by_request, f"request id {request.id} is in use"
        check_feasible(request, self.limits)
        self._now_s = now_s
        self._expire_pins(now_s)  # before it waits: a pin that was up is not kept for it
        sequence = Sequence(self._sequences_seen, request, now_s)
        self._sequences_seen += 1
        self._by_request[request.id] = sequence
        for hook in self._on_submitted:
            hook(sequence, now_s)
        self._waiting.add(sequence, now_s)
        self._standing_steps = 0

    def cancel(self, request_id: str, reason: CancelReason, now_s: float) -> Finished | None:
        """End a request, queued or running; None if it is not here (any more). Its KV may stay as prefix."""
        self._now_s = now_s
        sequence = self._by_request.get(request_id)
        if sequence is None:
            return None
        if not sequence.running:
            self._leave_queue(sequence)
            self._standing_steps = 0  # whom it held up may start with the next step
        finish = FinishReason.STOP if reason is CancelReason.STOP_STRING else FinishReason.CANCELLED
        return self._finish(sequence, finish, now_s, detail=reason.value)

    def advise(self, advice: Advice, now_s: float) -> None:
        """Take in a hint; one about something that is not here (any more) does nothing."""
        self._now_s = now_s
        self._expire_pins(now_s)
        if isinstance(advice, ProgramLeft):
            if self._pins.end(advice.program, PinEvent.RELEASED, now_s):
                self._standing_steps = 0
            return
        sequence = self._by_request.get(advice.request_id)
        if sequence is not None:
            sequence.request = replace(sequence.request, tool=advice.tool)

    def fail_all(self, detail: str, now_s: float) -> list[Finished]:
        """The executor broke: answer everything here as failed."""
        self._now_s = now_s
        self._outstanding = None
        failed = []
        for sequence in list(self._by_request.values()):
            if not sequence.running:
                self._leave_queue(sequence)
            failed.append(self._finish(sequence, FinishReason.FAILED, now_s, detail=detail))
        if self._swapping is not None:
            self._swapping.abandon(now_s)
        return failed

    def _leave_queue(self, sequence: Sequence) -> None:
        """It waits, or its KV is on its way from the host."""
        if self._swapping is not None and sequence.seq_id in self._swapping.loading:
            self._swapping.unload(sequence)
        else:
            self._waiting.remove(sequence)

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when there is nothing to do. Each plan is completed before the next."""
        assert self._outstanding is None, "complete the last plan first"
        self._now_s = now_s
        self._expire_pins(now_s)
        if self._standing_steps > 0 and self._stack.rank.version(now_s) == self._rank_version:
            plan: StepPlan | None = self._plan_again(now_s)
        else:
            plan = self._plan_afresh(now_s)
        self._outstanding = plan
        return plan

    # ---- making a plan --------------------------------------------------------------------------------

    def _plan_afresh(self, now_s: float) -> StepPlan | None:
        self._refresh_ranks(now_s)
        preempted_before = self._stats.preemptions_total
        self._secure_decodes(now_s)
        if self._waiting and self._stats.preemptions_total == preempted_before:
            self._admit_waiting(now_s)
        if not self._running and self._swapping is not None and self._swapping.is_busy:
            return self._wait_for_copies(self._swapping)
        if not self._running:
            assert not self._waiting, "a policy admits the head of the queue when nothing runs"
            self._events.clear()
            return None
        composition = self._stack.compose.compose(self, now_s)
        chunks = self._chunks(composition, now_s)
        while composition.shares and not chunks and self._prefilling and not self._lane.members:
            # Whom the step was for has yielded: the others may have it
            composition = self._stack.compose.compose(self, now_s)
            chunks = self._chunks(composition, now_s)
        paused = self._paused(composition, bool(chunks))
        decodes = composition.decode or not chunks  # where every chunk had to yield, the decodes go on
        decode_count = len(self._lane.members) - len(paused) if decodes else 0
        if not chunks and not decode_count and self._swapping is not None and self._swapping.is_busy:
            return self._wait_for_copies(self._swapping)
        assert chunks or decode_count, "a step computes something while something runs"
        plan = self._make_plan(chunks, decode_count, paused)
        # Where somebody had to yield, the next plan may admit again.
        if not chunks and not paused and self._stats.preemptions_total == preempted_before:
            plan.repeat = self._steps_without_decision(now_s)
            plan.until_s = self._pins.due_s
        self._standing_steps = plan.repeat - 1
        return plan

    def _wait_for_copies(self, swapping: Swapping) -> StepPlan:
        """A plan that computes nothing: who runs, if anybody, has no blocks but those of who is loaded."""
        swapping.wait_for_any()
        self._standing_steps = 0
        return self._make_plan([], 0, frozenset())

    def _plan_again(self, now_s: float) -> StepPlan:
        """One more step of the standing decode plan: only full blocks need something."""
        self._secure_decodes(now_s)
        plan = self._make_plan([], len(self._lane.members), frozenset())
        plan.repeat = self._standing_steps
        plan.until_s = self._pins.due_s
        self._standing_steps -= 1
        return plan

    def _make_plan(self, chunks: list[Chunk], decode_count: int, paused: frozenset[int]) -> StepPlan:
        plan = self._draft.plan(self._steps_planned, chunks, decode_count, paused)
        self._steps_planned += 1
        return plan

    def _steps_without_decision(self, now_s: float) -> int:
        """For how many decode steps nobody ends for sure, the blocks last, and no policy changes its mind."""
        if not self.limits.repeat or self._pins.has_overdue:
            return 1
        if self._stack.rank.version(now_s) != self._rank_version:
            return 1  # it changed while this plan was made
        steps = self._lane.steps_to_finish()
        for steps_valid in self._steps_valid:
            steps = min(steps, steps_valid(self, now_s))
        return self._lane.edges_within(steps, self._pool.available)

    def _refresh_ranks(self, now_s: float) -> bool:
        """Bring the order up to date with the policy; whether it has changed."""
        self._waiting.refresh(now_s)
        version = self._stack.rank.version(now_s)
        if version == self._rank_version:
            return False
        self._rank_version = version
        self._ranked = None
        self._prefilling.sort(key=self._rank_key)
        return True

    def _admit_waiting(self, now_s: float) -> None:
        room = self._stack.compose.prefill_room(self, now_s)
        self._head_reason = None
        passed = 0  # siblings that wait for their leader hold up nobody else
        while passed < len(self._waiting):
            sequence = self._waiting.at(passed)
            sibling = self._waits_for_sibling(sequence)
            if sibling is not None:
                self._head_reason = self._head_reason or sibling
                if room <= 0:
                    return  # and nobody behind it could start either
                passed += 1
                continue
            refusal, computed = self._try_admit(sequence, room, now_s)
            while refusal is not None and (self._make_room(refusal, now_s) or self._unpin(refusal, now_s)):
                room = self._stack.compose.prefill_room(self, now_s)  # who yielded had a share of the step
                refusal, computed = self._try_admit(sequence, room, now_s)
            if refusal is not None:
                self._head_reason = refusal.reason
                return
            room -= computed
            if self._refresh_ranks(now_s):  # who starts may change whose turn is next
                passed = 0

    def _waits_for_sibling(self, sequence: Sequence) -> WaitReason | None:
        """Whether another is still computing the prompt, or the beginning of it, that both share."""
        if self._group_leaders.is_computing(sequence):
            return WaitReason.GROUP
        return WaitReason.LEADER if self._waits_for_leader(sequence) else None

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether a sibling that ranks before it is still computing the prompt both share."""
        leader = self._by_request.get(sequence.request.leader_id or "")
        if leader is None or not self.limits.prefix_cache or leader.output_len:
            return False
        return leader.arrival_index < sequence.arrival_index

    def _try_admit(self, sequence: Sequence, room: int, now_s: float) -> tuple[Refusal | None, int]:
        """Start `sequence` and say how many tokens it must compute, or say why it waits."""
        cached_blocks = self._prefixes.cached_blocks(sequence)
        cached_len = len(cached_blocks) * self.block_tokens
        revived = self._pool.parked_among(cached_blocks)
        restored_len = 0 if self._swapping is None else self._swapping.found_len(sequence)
        candidate = Candidate(sequence, cached_len, len(cached_blocks), revived, restored_len)
        if self._swapping is not None and self._swapping.is_leaving(sequence):
            return Refusal(candidate, WaitReason.KV_COPY), 0
        if self.slots_used >= self.limits.running_max:
            return Refusal(candidate, WaitReason.SLOTS), 0
        if room <= 0:
            return Refusal(candidate, WaitReason.STEP_BUDGET), 0
        admission = self._stack.admit.decide(candidate, self, now_s)
        if admission.reason is not None:
            return Refusal(candidate, admission.reason), 0
        if self._swapping is not None:
            return self._restore(self._swapping, candidate, cached_blocks, admission.reserve_len, now_s)
        self._start(sequence, cached_blocks, admission.reserve_len, now_s)
        return None, sequence.total_len - cached_len

    def _restore(
        self,
        swapping: Swapping,
        candidate: Candidate,
        cached_blocks: list[int],
        reserve_len: int,
        now_s: float,
    ) -> tuple[Refusal | None, int]:
        """Start with what the host has, in blocks for all of it where they are to be had, else as granted."""
        sequence, restored_len = candidate.sequence, candidate.restored_len
        assert isinstance(sequence, Sequence)
        if restored_len > reserve_len:
            fits = candidate.blocks_for(restored_len, self.block_tokens) <= self.blocks_available
            reserve_len = restored_len = restored_len if fits else reserve_len
        needed = max(candidate.blocks_for(reserve_len, self.block_tokens), candidate.blocks_revived)
        if swapping.is_busy and needed > self._pool.available:
            return Refusal(candidate, WaitReason.KV_COPY), 0  # room is on its way
        self._start(sequence, cached_blocks, reserve_len, now_s, restored_len)
        if sequence.seq_id in swapping.loading:
            return None, 0  # the step has room for others while it is copied
        return None, sequence.total_len - max(candidate.cached_len, restored_len)

    def _make_room(self, refusal: Refusal, now_s: float) -> bool:
        """Whether somebody has yielded to the head of the queue."""
        if refusal.reason not in (WaitReason.SLOTS, WaitReason.KV_CAPACITY):
            return False
        victim = self._stack.preempt.make_room(refusal, self, now_s)
        if victim is None:
            return False
        head = refusal.candidate.sequence
        assert isinstance(victim, Sequence) and isinstance(head, Sequence) and victim.running
        assert self._rank_key(victim) > self._rank_key(head), "nobody yields to a lower rank"
        self._preempt(victim, head, PreemptReason.OUTRANKED, now_s)
        return True

    def _unpin(self, refusal: Refusal, now_s: float) -> bool:
        """Whether a pin went, because nothing runs and the head of the queue has no room."""
        if self.slots_used or refusal.reason is not WaitReason.KV_CAPACITY:
            return False
        return self._pins.sacrifice(now_s, refusal.candidate.sequence.request.program)

    def _expire_pins(self, now_s: float) -> None:
        if self._pins.due_s < now_s or self._pins.has_overdue:
            if self._pins.expire(now_s, self._waiting.has_turn_of):
                self._standing_steps = 0  # there is room that there was not

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

    def _paused(self, composition: Composition, has_chunks: bool) -> frozenset[int]:
        """Whom the composer leaves out, and who lacks a block. Somebody moves: if need be the former do."""
        if not composition.paused and not self._sitting_out:
            return frozenset()
        members = self._lane.members.keys()
        without = self._sitting_out.intersection(members)
        chosen = {sequence.arrival_index for sequence in composition.paused}  # equals the seq_id
        paused = frozenset((chosen | without) & members)
        return without if not has_chunks and len(paused) == len(members) else paused
