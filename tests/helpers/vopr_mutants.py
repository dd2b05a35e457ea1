"""Slips of the pen in the real desk, replica, pool and twin, each with the checks that may find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from penstock.core.events import Finished, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.desk.desk import Desk
from penstock.replica import replica as replica_module
from penstock.replica import results as results_module
from penstock.replica import sequence as sequence_module
from penstock.replica.groups import GroupLeaders
from penstock.replica.host_tier import HostTier
from penstock.replica.kv_pool import KVPool
from penstock.replica.lane import DecodeLane
from penstock.replica.replica import Replica
from penstock.replica.sequence import Phase, Sequence
from penstock.replica.swapping import Swapping
from penstock.replica.waiting import WaitingQueue
from penstock.twin.executor import ModelledExecutor

Patch = pytest.MonkeyPatch
Mutate = Callable[[Patch], None]
MUTANTS: dict[str, tuple[Mutate, str]] = {}
SWAPPING = (  # looked for among the systems that can have them
    "a_block_is_free_before_its_copy_is_done",
    "what_is_loaded_runs_at_once",
    "a_failed_copy_counts",
    "the_host_forgets_where_a_copy_ends",
)


def mutant(*checks: str) -> Callable[[Mutate], Mutate]:
    """Register a mutant, with (beginnings of) the checks that may find it."""

    def add(mutate: Mutate) -> Mutate:
        MUTANTS[mutate.__name__] = (mutate, "|".join(checks))
        return mutate

    return add


# ---- the KV pool ------------------------------------------------------------------------------------------


@mutant("AssertionError in check_invariants")
def a_block_is_released_twice(patch: Patch) -> None:
    release = KVPool.release

    def twice(
        self: KVPool, blocks: Any, shared_count: int, request: Request, now_s: float, first: int = 0
    ) -> None:
        release(self, blocks, shared_count, request, now_s, first)
        release(self, blocks[shared_count:], 0, request, now_s)

    patch.setattr(KVPool, "release", twice)


@mutant("AssertionError in check_invariants")
def a_block_is_lost_at_release(patch: Patch) -> None:
    release = KVPool.release
    patch.setattr(KVPool, "release", lambda self, blocks, *rest: release(self, blocks[:-1], *rest))


@mutant("AssertionError in check_invariants", "kv-private")
def a_shared_block_gets_no_holder(patch: Patch) -> None:
    def share(self: KVPool, blocks: Any) -> None:
        for block in blocks:
            if self._holders[block] == 0:
                self._retain.revived(block)
                self._holders[block] = 1

    patch.setattr(KVPool, "share", share)


@mutant("kv-content", "kv-salt", "kv-leak", "kv-private", "AssertionError in check_invariants")
def a_block_is_published_before_it_is_computed(patch: Patch) -> None:
    start = Replica._start

    def early(self: Replica, sequence: Sequence, *rest: Any) -> None:
        start(self, sequence, *rest)
        if sequence.is_keyed and self.limits.prefix_cache:
            full_blocks = min(sequence.total_len // self.block_tokens, len(sequence.blocks))
            keys = sequence.key_blocks(full_blocks, self.block_tokens)
            for index in range(sequence.published_blocks, len(keys)):
                self._pool.publish(sequence.blocks[index], keys[index])
            sequence.published_blocks = len(keys)

    patch.setattr(Replica, "_start", early)


@mutant("kv-salt")
def the_salt_is_left_out_of_the_keys(patch: Patch) -> None:
    salt_key = sequence_module.salt_key
    patch.setattr(sequence_module, "salt_key", lambda salt: salt_key(""))


@mutant("kv-content")
def a_key_misses_the_last_token(patch: Patch) -> None:
    chain_key = sequence_module.chain_key
    patch.setattr(sequence_module, "chain_key", lambda previous, content: chain_key(previous, content[:-1]))


@mutant("kv-content", "kv-salt")
def keys_do_not_chain(patch: Patch) -> None:
    chain_key = sequence_module.chain_key
    patch.setattr(sequence_module, "chain_key", lambda previous, content: chain_key(b"", content))


@mutant("AssertionError", "IndexError")
def the_pool_forgets_a_dropped_block(patch: Patch) -> None:
    def drop(self: KVPool, now_s: float) -> int:
        block = self._retain.victim(now_s)
        self._holders.pop(block)
        del self._block_of[self._key_of[block]]
        return block  # its key stays behind

    patch.setattr(KVPool, "_drop_parked", drop)


def without_own_books(patch: Patch) -> None:
    """The product's own invariants are silent: the checkers outside must do."""
    for kind in (KVPool, Replica, DecodeLane, Desk):
        patch.setattr(kind, "check_invariants", lambda *rest: None)


@mutant("kv-private")
def two_sequences_get_one_block(patch: Patch) -> None:
    without_own_books(patch)
    allocate = KVPool.allocate

    def generous(self: KVPool, count: int, now_s: float, owner: int = 0) -> list[int]:
        blocks = allocate(self, count, now_s, owner)
        self._free += blocks[:1]
        return blocks

    patch.setattr(KVPool, "allocate", generous)


@mutant("kv-leak")
def a_preempted_block_is_held_by_nobody(patch: Patch) -> None:
    without_own_books(patch)
    release = KVPool.release
    patch.setattr(KVPool, "release", lambda self, blocks, *rest: release(self, blocks[:-1], *rest))


@mutant("kv-guard")
def a_block_is_free_before_its_copy_is_done(patch: Patch) -> None:
    out = Swapping.out

    def hasty(self: Swapping, victim: Sequence, view: Any, now_s: float) -> int:
        kept = out(self, victim, view, now_s)
        for flight in self._flights.values():
            self._release(flight, now_s)
        return kept

    patch.setattr(Swapping, "out", hasty)


@mutant("kv-guard", "kv-content")
def what_is_loaded_runs_at_once(patch: Patch) -> None:
    load = Swapping.load

    def impatient(self: Swapping, sequence: Sequence, *rest: Any) -> bool:
        if load(self, sequence, *rest):
            del self.loading[sequence.seq_id]
            next(each for each in self._flights.values() if each.loads is sequence).loads = None
        return False

    patch.setattr(Swapping, "load", impatient)


@mutant("kv-content")
def a_failed_copy_counts(patch: Patch) -> None:
    done = Swapping.done
    patch.setattr(
        Swapping,
        "done",
        lambda self, told, *rest: done(self, [replace(each, ok=True) for each in told], *rest),
    )


@mutant("kv-content", "AssertionError in load")
def the_host_forgets_where_a_copy_ends(patch: Patch) -> None:
    found = HostTier.found_len
    patch.setattr(
        HostTier, "found_len", lambda self, sequence: found(self, sequence) and found(self, sequence) + 1
    )


# ---- the replica ------------------------------------------------------------------------------------------


@mutant("AssertionError in check_invariants", "kv-leak")
def a_cancel_keeps_its_blocks(patch: Patch) -> None:
    cancel = Replica.cancel

    def leaky(self: Replica, *rest: Any) -> Finished | None:
        self._pool.release = lambda *rest: None
        try:
            return cancel(self, *rest)
        finally:
            del self._pool.release

    patch.setattr(Replica, "cancel", leaky)


@mutant("liveness", "one-end", "stats")
def a_finished_event_is_dropped(patch: Patch) -> None:
    complete = Replica.complete

    def forgetful(self: Replica, *rest: Any) -> list[Any]:
        events = complete(self, *rest)
        return events[:-1] if events and isinstance(events[-1], Finished) else events

    patch.setattr(Replica, "complete", forgetful)


@mutant("one-end")
def a_finished_event_is_told_twice(patch: Patch) -> None:
    complete = Replica.complete

    def repeating(self: Replica, *rest: Any) -> list[Any]:
        events = complete(self, *rest)
        return [*events, events[-1]] if events and isinstance(events[-1], Finished) else events

    patch.setattr(Replica, "complete", repeating)


@mutant("output")
def a_token_is_told_twice(patch: Patch) -> None:
    complete = Replica.complete

    def stuttering(self: Replica, *rest: Any) -> list[Any]:
        events = complete(self, *rest)
        return [events[0], *events] if events and isinstance(events[0], TokenOut) else events

    patch.setattr(Replica, "complete", stuttering)


@mutant("cancel")
def a_cancel_of_a_waiting_request_is_ignored(patch: Patch) -> None:
    cancel = Replica.cancel

    def deaf(self: Replica, request_id: str, reason: CancelReason, now_s: float) -> Finished | None:
        sequence = self._by_request.get(request_id)
        return cancel(self, request_id, reason, now_s) if sequence and sequence.running else None

    patch.setattr(Replica, "cancel", deaf)


@mutant("leaps")
def a_cancelled_head_holds_the_queue(patch: Patch) -> None:
    """The bug that the simulation found: a standing plan went on over it."""
    cancel = Replica.cancel

    def as_it_was(self: Replica, request_id: str, reason: CancelReason, now_s: float) -> Finished | None:
        sequence, standing = self._by_request.get(request_id), self._standing_steps
        finished = cancel(self, request_id, reason, now_s)
        if sequence is not None and not sequence.running and sequence.phase is Phase.QUEUE:
            self._standing_steps = standing
        return finished

    patch.setattr(Replica, "cancel", as_it_was)


@mutant("one-end")
def a_cancelled_request_is_admitted_afterwards(patch: Patch) -> None:
    """The other one: an event after the last."""
    complete = Replica.complete

    def late(self: Replica, *rest: Any) -> list[Any]:
        of_the_gone = [event for event in self._events if event.request_id not in self._by_request]
        return [*of_the_gone, *complete(self, *rest)]

    patch.setattr(Replica, "complete", late)


@mutant("running-max")
def one_more_runs_than_may(patch: Patch) -> None:
    try_admit = Replica._try_admit

    def generous(self: Replica, *rest: Any) -> Any:
        limits = self.limits
        self.limits = replace(limits, running_max=limits.running_max + 1)
        try:
            return try_admit(self, *rest)
        finally:
            self.limits = limits

    patch.setattr(Replica, "_try_admit", generous)


@mutant("plan", "kv-content", "AssertionError")
def a_preempted_sequence_keeps_its_computed_length(patch: Patch) -> None:
    preempt = Replica._preempt

    def forgetful(self: Replica, victim: Sequence, *rest: Any) -> None:
        computed = victim.computed_len
        preempt(self, victim, *rest)
        victim.computed = max(0, computed - 1)

    patch.setattr(Replica, "_preempt", forgetful)


@mutant("plan", "kv-content", "output", "AssertionError")
def a_resumed_sequence_starts_one_block_too_far(patch: Patch) -> None:
    start = Replica._start

    def ahead(self: Replica, sequence: Sequence, cached: list[int], *rest: Any) -> None:
        resumed = sequence.phase is Phase.PREEMPTED
        start(self, sequence, cached, *rest)
        if resumed and sequence.total_len - sequence.computed > 1:
            sequence.computed += 1

    patch.setattr(Replica, "_start", ahead)


@mutant("repeat")
def a_plan_stands_one_step_too_long(patch: Patch) -> None:
    steps = DecodeLane.steps_to_finish
    patch.setattr(DecodeLane, "steps_to_finish", lambda self: steps(self) + 1)


@mutant("cancel")
def a_stop_string_ends_as_cancelled(patch: Patch) -> None:
    cancel = Replica.cancel

    def plain(self: Replica, request_id: str, reason: CancelReason, now_s: float) -> Finished | None:
        finished = cancel(self, request_id, reason, now_s)
        return finished and replace(finished, reason=FinishReason.CANCELLED)

    patch.setattr(Replica, "cancel", plain)


@mutant("clock")
def a_token_is_told_before_its_time(patch: Patch) -> None:
    make = results_module._token_event
    patch.setattr(results_module, "_token_event", lambda *rest: replace(make(*rest), at_s=0.0))


@mutant("feasible")
def the_engine_refuses_what_just_fits(patch: Patch) -> None:
    check = replica_module.check_feasible
    patch.setattr(
        replica_module,
        "check_feasible",
        lambda request, limits: check(request, replace(limits, kv_blocks=limits.kv_blocks - 1)),
    )


@mutant("phases", "AssertionError in enter")
def the_queue_time_is_forgotten(patch: Patch) -> None:
    enter = Sequence.enter

    def forgetful(self: Sequence, phase: Phase, now_s: float) -> None:
        enter(self, phase, now_s)
        if phase is Phase.PREFILL:
            self.phases.queue_s = 0.0

    patch.setattr(Sequence, "enter", forgetful)


@mutant("phases")
def preempted_time_is_charged_twice(patch: Patch) -> None:
    enter = Sequence.enter

    def greedy(self: Sequence, phase: Phase, now_s: float) -> None:
        if self.phase is Phase.PREEMPTED:
            self.phases.decode_s += now_s - self.last_s
        enter(self, phase, now_s)

    patch.setattr(Sequence, "enter", greedy)


@mutant("fcfs")
def the_newest_is_admitted_first(patch: Patch) -> None:
    patch.setattr(WaitingQueue, "at", lambda self, place: list(self)[-1 - place])


@mutant("fcfs")
def a_preempted_sequence_loses_its_place(patch: Patch) -> None:
    preempt = Replica._preempt

    def demoted(self: Replica, victim: Sequence, *rest: Any) -> None:
        preempt(self, victim, *rest)
        entries = self._waiting._lines[self._waiting._name(victim)]
        index = next(i for i, entry in enumerate(entries) if entry[2] is victim)
        entries.append(entries.pop(index))

    patch.setattr(Replica, "_preempt", demoted)


@mutant("AssertionError in _plan_afresh", "liveness")
def a_group_waits_for_itself(patch: Patch) -> None:
    patch.setattr(GroupLeaders, "is_computing", lambda self, sequence: sequence.request.group_id is not None)


@mutant("step-budget")
def a_step_takes_twice_its_budget(patch: Patch) -> None:
    patch.setattr(Replica, "step_tokens_max", property(lambda self: 2 * self.limits.step_tokens_max))


@mutant("output", "plan", "repeat", "AssertionError")
def the_stop_token_goes_unnoticed(patch: Patch) -> None:
    take = Replica._take_token

    def blind(self: Replica, sequence: Sequence, *rest: Any) -> None:
        request = sequence.request
        sequence.request = replace(request, stop_token_ids=frozenset())
        take(self, sequence, *rest)
        sequence.request = request

    patch.setattr(Replica, "_take_token", blind)


@mutant("one-end", "liveness", "stats", "AssertionError", "kv-leak")
def a_crash_forgets_who_waited(patch: Patch) -> None:
    fail_all = Replica.fail_all

    def partial(self: Replica, *rest: Any) -> list[Finished]:
        return [event for event in fail_all(self, *rest) if event.phases.prefill_s or event.output_tokens]

    patch.setattr(Replica, "fail_all", partial)


@mutant("stats")
def the_statistics_miss_the_waiting(patch: Patch) -> None:
    stats = Replica.stats

    def blind(self: Replica) -> Any:
        found = stats(self)
        found.waiting = 0
        return found

    patch.setattr(Replica, "stats", blind)


# ---- the lane ---------------------------------------------------------------------------------------------


@mutant("plan")
def the_lane_misses_an_edge(patch: Patch) -> None:
    at_edge = DecodeLane.at_edge

    def careless(self: DecodeLane) -> dict[int, Sequence]:
        return {} if self.clock % 5 == 4 else at_edge(self)

    patch.setattr(DecodeLane, "at_edge", careless)


@mutant("AssertionError", "output", "repeat", "plan")
def the_lane_forgets_who_is_done(patch: Patch) -> None:
    finished = DecodeLane.finished
    patch.setattr(DecodeLane, "finished", lambda self: finished(self)[:1])


@mutant("leaps", "plan")
def a_leap_runs_out_of_blocks(patch: Patch) -> None:
    patch.setattr(DecodeLane, "edges_within", lambda self, steps, limit: steps)


# ---- the desk ---------------------------------------------------------------------------------------------


@mutant("AssertionError in check_invariants")
def the_desk_keeps_the_tokens_of_the_cancelled(patch: Patch) -> None:
    cancel = Desk.cancel

    def leaky(self: Desk, request_id: str) -> bool:
        tokens = self._waiting_tokens
        found = cancel(self, request_id)
        self._waiting_tokens = tokens
        return found

    patch.setattr(Desk, "cancel", leaky)


@mutant("desk-bounds")
def the_desk_lets_one_too_many_wait(patch: Patch) -> None:
    check_now = Desk._check_now

    def generous(self: Desk, count: int, tokens: int, tenant: str) -> None:
        settings = self._settings
        self._settings = replace(settings, queue_requests_max=settings.queue_requests_max + 1)
        try:
            check_now(self, count, tokens, tenant)
        finally:
            self._settings = settings

    patch.setattr(Desk, "_check_now", generous)


@mutant("desk-bounds", "AssertionError in check_invariants")
def the_desk_hands_over_beyond_its_window(patch: Patch) -> None:
    release = Desk.release

    def eager(self: Desk) -> list[Request]:
        self._engine_window += 1
        try:
            return release(self)
        finally:
            self._engine_window -= 1

    patch.setattr(Desk, "release", eager)


@mutant("desk-line")
def the_desk_forgets_whom_it_released(patch: Patch) -> None:
    release = Desk.release
    patch.setattr(Desk, "release", lambda self: release(self)[:1])


@mutant("liveness")
def the_last_in_the_line_waits_for_ever(patch: Patch) -> None:
    release = Desk.release
    patch.setattr(Desk, "release", lambda self: release(self) if self.waiting_count > 1 else [])


@mutant("desk-order")
def the_desk_ignores_priorities(patch: Patch) -> None:
    enter = Desk.enter

    def plain(self: Desk, requests: Any) -> None:
        self._rank_key = lambda request: (0.0,)
        enter(self, requests)

    patch.setattr(Desk, "enter", plain)


@mutant("desk-bounds", "AssertionError")
def the_desk_counts_no_tenant(patch: Patch) -> None:
    check_now = Desk._check_now
    patch.setattr(
        Desk, "_check_now", lambda self, count, tokens, tenant: check_now(self, count, tokens, "nobody")
    )


# ---- the twin, and determinism ----------------------------------------------------------------------------


@mutant("output", "leaps")
def a_leap_goes_one_step_past_an_end(patch: Patch) -> None:
    execute = ModelledExecutor.execute

    def late(self: ModelledExecutor, plan: Any) -> Any:
        self._stops = [(clock + 1, seq_id) for clock, seq_id in self._stops]
        return execute(self, plan)

    patch.setattr(ModelledExecutor, "execute", late)


@mutant("determinism")
def something_remembers_the_run_before(patch: Patch) -> None:
    calls: list[int] = []
    allocate = KVPool.allocate

    def moody(self: KVPool, count: int, now_s: float, owner: int = 0) -> list[int]:
        calls.append(count)
        blocks = allocate(self, count, now_s)
        return blocks[::-1] if len(calls) % 7 == 0 else blocks

    patch.setattr(KVPool, "allocate", moody)
