"""From what the executor computed to what happened: tokens, full blocks, ends."""

from __future__ import annotations

from penstock.core.events import Preempted, ReplicaEvent, TokenOut
from penstock.core.reasons import FinishReason, PreemptReason
from penstock.core.step import Chunk, StepPlan, StepResult
from penstock.policies.view import StepFacts
from penstock.replica.books import Books
from penstock.replica.sequence import Phase, Sequence
from penstock.replica.swapping import Swapping

_Ends = dict[int, tuple[FinishReason, int | None]]  # seq_id → why, and the stop token if one was drawn


class Results(Books):
    """Takes the result of each plan."""

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
        facts = self._step_facts(plan, result) if self._on_stepped and plan.token_count else None
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
        if facts is not None:
            for hook in self._on_stepped:
                hook(facts, now_s)
        if self._swapping is not None:
            self._take_copies(self._swapping, result, now_s)
        stats = self._stats
        stats.step_index = plan.index + result.steps - 1
        stats.step_tokens = plan.token_count
        stats.step_s = result.duration_s
        return events

    def _take_copies(self, swapping: Swapping, result: StepResult, now_s: float) -> None:
        """Copies that are done: their blocks are free, and who was loaded runs."""
        self._stats.swap_stall_s_total += result.stalled_s
        if not result.copied:
            return
        for sequence, is_good in swapping.done(result.copied, now_s, self._on_copied):
            if is_good:
                self._enter_running(sequence, now_s)
            else:
                self._put_back(sequence, now_s)
        self._standing_steps = 0

    def _put_back(self, sequence: Sequence, now_s: float) -> None:
        """What it was to be loaded with is gone; it waits to be computed again."""
        lost = sequence.computed
        self._stats.preempted_tokens_total[PreemptReason.KV_LOST.value] += lost
        self._events.append(Preempted(sequence.request.id, now_s, PreemptReason.KV_LOST, lost))
        self._release_kv(sequence, now_s)
        self._waiting.add(sequence, now_s)

    def _step_facts(self, plan: StepPlan, result: StepResult) -> StepFacts:
        """Taken before anybody advances."""
        prefills = tuple((chunk.count, chunk.start + chunk.count) for chunk in plan.chunks)
        context = self._lane.context
        for seq_id in plan.paused:
            if seq_id in self._lane.members:
                context -= self._lane.members[seq_id].computed_len
        context = context + plan.decode_count if plan.decode_count else 0
        return StepFacts(prefills, plan.decode_count, context, result.steps, result.duration_s)

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
                    self._prefixes.publish(sequence)
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
            self._prefixes.publish(sequence)
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
        for hook in self._on_decoding:
            hook(sequence, now_s)
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


def _token_event(sequence: Sequence, token_id: int, result: StepResult, now_s: float) -> TokenOut:
    event = TokenOut(sequence.request.id, now_s, token_id)
    if result.logprobs:
        event.logprobs = result.logprobs.get(sequence.seq_id)
    if sequence.prompt_logprobs and sequence.output_len == 1:
        event.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
    return event
