"""What must hold, watched from outside the code under test. Everything here raises CheckFailed.

The gateway's side tells of each call (`entered`, `refused`, `released`, `ended`), the engine's side of each
event; the books kept here are made of these alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from penstock.core.events import Admitted, Finished, Preempted, ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.desk import Desk
from penstock.policies.stack import rank_class
from penstock.replica.replica import Replica
from penstock.twin.vopr.content import expected_output, folds
from penstock.twin.vopr.failure import CheckFailed, require
from penstock.twin.vopr.script import Call, System

ANSWERS = (FinishReason.STOP, FinishReason.LENGTH)
# Instants are sums of many floats; a phase that is truly missing is a step long.
_TOLERANCE_S = 1e-6


@dataclass(slots=True, eq=False)
class _Life:
    """One request, as far as the world has been told."""

    request: Request
    output: list[int] | None  # what it must produce; None where only lengths are known
    output_len: int  # tokens that it must produce, a stop token included
    natural_end: FinishReason
    line_place: int
    told: list[int] = field(default_factory=list)
    is_released: bool = False
    end: FinishReason | None = None
    submitted_s: float = 0.0
    first_token_s: float | None = None
    last_s: float = 0.0
    runs: bool = False
    engine_end: Finished | None = None


class Checkers:
    """One run's witness."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._lives: dict[str, _Life] = {}
        self._refused: set[str] = set()
        self._line: dict[str, _Life] = {}
        self._in_engine: dict[str, _Life] = {}  # in order of submission
        self._order: dict[str, int] = {}
        self._computed: defaultdict[str, set[int]] = defaultdict(set)  # salt → prefixes that have had KV
        self._call_tokens_max = 0
        self.preemptions = 0

    @property
    def open_work_tokens(self) -> int:
        """Tokens still to be computed at most, by everybody who has not ended."""
        return sum(
            life.request.total_len_max + life.request.max_output_tokens
            for life in self._lives.values()
            if life.end is None
        )

    @property
    def open_count(self) -> int:
        return sum(life.end is None for life in self._lives.values())

    def ends(self) -> dict[str, int]:
        """How many requests ended how."""
        counts = {reason.value: 0 for reason in FinishReason}
        for life in self._lives.values():
            if life.end is not None:
                counts[life.end.value] += 1
        counts[FinishReason.REFUSED.value] += len(self._refused)
        return counts

    def end_facts(self) -> dict[str, tuple[object, ...]]:
        """How and when each request ended, by the engine's word."""
        return {
            name: (life.end, end and (end.reason, end.output_tokens, end.at_s, end.cached_tokens, end.phases))
            for name, life in self._lives.items()
            for end in (life.engine_end,)
        }

    def output_ends(self) -> dict[str, int]:
        """For each request in the engine, the longest it may become."""
        return {
            name: life.request.prompt_len + life.request.max_output_tokens
            for name, life in self._in_engine.items()
        }

    # ---- the gateway's side ---------------------------------------------------------------------------

    def entered(self, call: Call, requests: list[Request]) -> None:
        self._call_tokens_max = max(self._call_tokens_max, sum(request.total_len_max for request in requests))
        for request in requests:
            require(request.id not in self._lives, "one-end", f"{request.id} entered twice")
            life = self._make_life(call, request)
            self._lives[request.id] = self._line[request.id] = life

    def refused(self, requests: list[Request]) -> None:
        for request in requests:
            require(request.id not in self._lives, "one-end", f"{request.id} was refused and is inside")
            self._refused.add(request.id)

    def released(self, request: Request) -> None:
        """The desk hands the request to the engine: nobody in the line may rank before it."""
        life = self._line.pop(request.id, None)
        if life is None:
            raise CheckFailed("desk-order", f"{request.id} is released and was not in the line")
        life.is_released = True
        key = _line_key(life)
        passed = [other.request.id for other in self._line.values() if _line_key(other) < key]
        require(not passed, "desk-order", f"{request.id} is released before {passed}")

    def ended(self, request_id: str, reason: FinishReason) -> None:
        """The client's side of the one end."""
        life = self._lives.get(request_id)
        if life is None:
            raise CheckFailed("one-end", f"{request_id} ended and never entered")
        require(life.end is None, "one-end", f"{request_id} ended as {life.end} and again as {reason}")
        life.end = reason
        self._line.pop(request_id, None)

    def after_desk(self, desk: Desk) -> None:
        """The desk's books, and its bounds as an operator would read them."""
        desk.check_invariants()
        system = self._system
        require(
            desk.waiting_count == len(self._line),
            "desk-line",
            f"{desk.waiting_count} wait, not {len(self._line)}",
        )
        require(desk.waiting_count <= system.queue_requests_max, "desk-bounds", "the line is too long")
        # A call that finds the line empty enters whole.
        tokens_max = max(system.queue_tokens_max, self._call_tokens_max)
        require(desk.waiting_tokens <= tokens_max, "desk-bounds", f"{desk.waiting_tokens} tokens wait")
        takes_queue = rank_class(system.rank).reorders
        window = system.running_max + (system.queue_requests_max if takes_queue else system.engine_ahead)
        require(desk.inside_count <= window, "desk-bounds", f"{desk.inside_count} are in the engine")
        if system.tenant_requests_max:
            tenants: defaultdict[str, int] = defaultdict(int)
            for life in self._lives.values():
                tenants[life.request.tenant] += life.end is None
            most = max(tenants.values(), default=0)
            require(most <= system.tenant_requests_max, "desk-bounds", f"a tenant has {most} requests inside")

    # ---- the engine's side ----------------------------------------------------------------------------

    def submitted(self, request: Request, now_s: float) -> None:
        life = self._lives[request.id]
        require(life.is_released, "one-end", f"{request.id} reaches the engine and was not released")
        life.submitted_s = life.last_s = now_s
        self._order[request.id] = len(self._order)
        self._in_engine[request.id] = life

    def turned_away(self, request_id: str) -> None:
        """The engine itself refused it at its door."""
        request = self._in_engine.pop(request_id).request
        blocks = -(-request.total_len_max // self._system.block_tokens)
        fits = blocks <= self._system.engine_blocks
        require(not fits, "feasible", f"{request!r} was refused and would fit")

    def cancelled(self, request_id: str, finished: Finished | None, reason: CancelReason) -> None:
        """The engine has obeyed a cancel: whoever was there is gone, by the stated reason."""
        require(request_id not in self._in_engine, "cancel", f"{request_id} was cancelled and stays")
        if finished is not None:
            is_text_whole = reason is CancelReason.STOP_STRING
            wanted = FinishReason.STOP if is_text_whole else FinishReason.CANCELLED
            is_told = finished.reason is wanted and finished.detail == reason.value
            require(is_told, "cancel", f"{request_id} was cancelled for {reason} and ended as {finished}")

    def block_computed(self, request_id: str, value: int) -> None:
        self._computed[self._lives[request_id].request.cache_salt].add(value)

    def engine_restarted(self) -> None:
        """All KV is lost."""
        self._computed.clear()

    def engine_died(self) -> None:
        self._in_engine.clear()

    def event(self, event: ReplicaEvent, now_s: float) -> None:
        life = self._in_engine.get(event.request_id)
        if life is None:
            raise CheckFailed("one-end", f"{event} is of nobody in the engine")
        require(life.last_s <= event.at_s <= now_s, "clock", f"{event} is out of time")
        if isinstance(event, Admitted):
            self._admitted(life, event)
        elif isinstance(event, Preempted):
            self._preempted(life, event)
        elif isinstance(event, TokenOut):
            self._token(life, event)
        else:
            self._finished(life, event)
        life.last_s = event.at_s

    def after_step(self, replica: Replica) -> None:
        replica.check_invariants()
        stats = replica.stats()
        here = stats.running + stats.waiting
        require(here == len(self._in_engine), "stats", f"the engine has {here}, not {len(self._in_engine)}")

    def idle(self, replica: Replica) -> None:
        """An engine without work holds no KV but what it keeps for later, perhaps pinned."""
        require(not self._in_engine, "liveness", f"the engine idles and has {list(self._in_engine)}")
        stats = replica.stats()
        held = stats.kv_blocks_used - stats.kv_blocks_pinned
        require(held == 0, "kv-leak", f"{held} blocks are held by nobody")
        is_clean = self._system.prefix_cache or stats.kv_blocks_cached == 0
        require(is_clean, "kv-leak", f"{stats.kv_blocks_cached} blocks are kept and the cache is off")

    # ---- the end --------------------------------------------------------------------------------------

    def at_rest(self, desk: Desk, offered: set[str]) -> None:
        """Nothing will happen any more."""
        lost = [name for name, life in self._lives.items() if life.end is None]
        require(not lost, "liveness", f"{lost} never ended")
        told = self._lives.keys() | self._refused
        require(told == offered, "one-end", f"{sorted(offered - told)} were never answered")
        in_desk = desk.waiting_count + desk.inside_count
        require(in_desk == 0, "desk-line", f"{in_desk} requests stay at the desk")

    # ---- one event ------------------------------------------------------------------------------------

    def _make_life(self, call: Call, request: Request) -> _Life:
        place = len(self._lives)
        if request.prompt_tokens is not None:
            output, end = expected_output(request)
            return _Life(request, output, len(output) + (end is FinishReason.STOP), end, place)
        stops = call.stops_after_tokens
        if 0 < stops <= request.max_output_tokens:
            return _Life(request, None, stops, FinishReason.STOP, place)
        return _Life(request, None, request.max_output_tokens, FinishReason.LENGTH, place)

    def _admitted(self, life: _Life, event: Admitted) -> None:
        require(not life.runs, "plan", f"{life.request.id} is admitted while it runs")
        life.runs = True
        self._check_cached(life, event.cached_len)
        if self._system.rank != "fcfs":
            return
        order = self._order[life.request.id]
        for name, other in self._in_engine.items():
            if self._order[name] >= order:
                return
            may_wait = other.request.group_id is not None or self._waited_for_leader(other, event.at_s)
            require(other.runs or may_wait, "fcfs", f"{life.request.id} overtakes {name}")

    def _waited_for_leader(self, life: _Life, planned_s: float) -> bool:
        """When the plan was made. Leniently where only lengths are known: no first token is told there."""
        leader_id = life.request.leader_id
        if leader_id is None or leader_id not in self._order or not self._system.prefix_cache:
            return False
        leader = self._lives[leader_id]
        end = leader.engine_end
        # Perhaps the leader was cancelled while the step ran, and is told of before the admission.
        was_there = end is None or end.at_s > planned_s or (end.at_s == planned_s and self._system.mid_step)
        return was_there and leader.first_token_s is None

    def _check_cached(self, life: _Life, cached_len: int) -> None:
        """Found KV was computed before, with equal salt and equal history."""
        if not cached_len:
            return
        require(self._system.prefix_cache, "kv-salt", f"{life.request.id} finds KV and the cache is off")
        prompt = life.request.prompt_tokens
        if prompt is None:
            keys = life.request.block_keys or ()
            found = cached_len // self._system.block_tokens
            require(found <= len(keys), "kv-salt", f"{life.request.id} finds more blocks than it has keys")
            return
        value = folds([*prompt, *life.told][:cached_len])[-1]
        is_known = value in self._computed[life.request.cache_salt]
        require(
            is_known, "kv-salt", f"{life.request.id} finds {cached_len} tokens that nobody shares with it"
        )

    def _preempted(self, life: _Life, event: Preempted) -> None:
        require(life.runs, "plan", f"{life.request.id} is preempted and does not run")
        life.runs = False
        self.preemptions += 1
        if (self._system.rank, self._system.preempt) != ("fcfs", "youngest-recompute"):
            return
        needy = self._order.get(event.for_request_id or "")
        is_fair = needy is not None and needy <= self._order[life.request.id]
        require(is_fair, "fcfs", f"{life.request.id} yields to {event.for_request_id}, which came later")

    def _token(self, life: _Life, event: TokenOut) -> None:
        assert life.output is not None, "tokens are told where they are known"
        place = len(life.told)
        life.told.append(event.token_id)
        is_right = place < len(life.output) and life.output[place] == event.token_id
        require(is_right, "output", f"{life.request.id} says {event.token_id} in place {place}")
        if life.first_token_s is None:
            life.first_token_s = event.at_s

    def _finished(self, life: _Life, event: Finished) -> None:
        del self._in_engine[event.request_id]
        life.engine_end = event
        life.runs = False
        self._check_phases(life, event)
        self._check_output(life, event)

    def _check_output(self, life: _Life, event: Finished) -> None:
        name, is_answer = life.request.id, event.reason in ANSWERS and event.detail is None
        require(event.output_tokens <= life.output_len, "output", f"{name} has {event.output_tokens} tokens")
        if is_answer:
            require(event.reason is life.natural_end, "output", f"{name} ended as {event.reason}")
            is_whole = event.output_tokens == life.output_len
            require(
                is_whole, "output", f"{name} ended after {event.output_tokens} of {life.output_len} tokens"
            )
        if life.output is None:
            return
        told = len(life.told) + (event.stop_token_id is not None)
        require(
            told == event.output_tokens, "output", f"{name} was told {told} of {event.output_tokens} tokens"
        )
        is_stop = event.stop_token_id is None or event.stop_token_id in life.request.stop_token_ids
        require(is_stop, "output", f"{name} stopped at {event.stop_token_id}")

    def _check_phases(self, life: _Life, event: Finished) -> None:
        phases, inside_s = event.phases, event.at_s - life.submitted_s
        parts = (phases.queue_s, phases.prefill_s, phases.decode_s, phases.preempted_s)
        require(all(part >= 0.0 for part in parts), "phases", f"{phases} of {event.request_id}")
        adds_up = math.isclose(phases.total_s, inside_s, rel_tol=_TOLERANCE_S, abs_tol=_TOLERANCE_S)
        require(adds_up, "phases", f"{phases} of {event.request_id} in {inside_s} s")
        if life.first_token_s is not None:
            is_same = event.first_token_s == life.first_token_s
            require(is_same, "phases", f"{event.request_id} was first heard at {life.first_token_s}")


def _line_key(life: _Life) -> tuple[int, float, int]:
    return (life.request.priority, life.request.arrival_s, life.line_place)
