"""The whole system in virtual time: front and engine, the pipes between them, and what happens to them.

One agenda of instants drives everything. The clock only moves forward, by itself to the next instant or by a
drawn jump, like the process's monotonic clock.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from penstock.core.events import ReplicaEvent
from penstock.core.reasons import CancelReason
from penstock.twin.vopr.checkers import Checkers
from penstock.twin.vopr.draw import stream
from penstock.twin.vopr.engine_host import Cancel, Command
from penstock.twin.vopr.failure import CheckFailed, require
from penstock.twin.vopr.front import Front
from penstock.twin.vopr.journal import Journal
from penstock.twin.vopr.laned_host import make_host
from penstock.twin.vopr.script import Call, Fault, FaultKind, Script

# What may happen in a run at most: a token takes a step and a message, some of them more than once.
HAPPENINGS_SPARE, HAPPENINGS_PER_TOKEN, HAPPENINGS_PER_ENTRY = 10_000, 10, 100
# Steps allowed after the faults: every open token twice over, since a preempted one is computed again.
STEPS_PER_TOKEN, STEPS_SPARE = 2, 100

_FAULTS_OF_A_STEP = (FaultKind.STALL, FaultKind.CRASH, FaultKind.CRASH_AFTER, FaultKind.MEMORY)


class Pipe:
    """One direction between front and engine: messages are late, but never overtake each other."""

    def __init__(self, delay_s: float, jitter_s: float, stream: random.Random) -> None:
        self._delay_s, self._jitter_s = delay_s, jitter_s
        self._stream = stream
        self._last_s = 0.0

    def arrival_s(self, now_s: float) -> float:
        due_s = now_s + self._delay_s + self._jitter_s * self._stream.random()
        self._last_s = max(self._last_s, due_s)
        return self._last_s


class World:
    """Runs one script to its end. Raises CheckFailed; what the product raises goes through as it is."""

    def __init__(self, script: Script) -> None:
        system = script.system
        self._script = script
        self.journal = Journal()
        self.checkers = Checkers(system)
        self.front = Front(system, self._send, self._engine_still_s, self.checkers, self.journal)
        self.engine = make_host(system, self.front.output_lens, self.checkers, self.journal)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._now_s = 0.0
        self._to_engine, self._to_front = (
            Pipe(system.link_s, system.link_jitter_s, stream(script.seed, name))
            for name in ("to-engine", "to-front")
        )
        self._slow: dict[int, float] = {}  # number of the fault → factor
        self._slow_seen = 0
        self._steps_left: int | None = None  # after the faults

    def run(self) -> None:
        for call in self._script.calls:
            self._at(call.at_s, partial(self._arrive, call))
        for fault in self._script.faults:
            self._at(fault.at_s, partial(self._strike, fault))
        self._at(self._script.calm_s, self._heal)
        left = self._happenings_max()
        while self._agenda:
            left -= 1
            require(left >= 0, "liveness", "the run never ends")
            at_s, _, act = heapq.heappop(self._agenda)
            self._move_clock(at_s)
            act()
        self.checkers.at_rest(self.front.desk, self.front.offered)
        require(self.front.open_count == 0, "liveness", f"{self.front.open_count} requests stay open")

    def _happenings_max(self) -> int:
        entries = len(self._script.calls) + len(self._script.faults)
        return HAPPENINGS_SPARE + HAPPENINGS_PER_TOKEN * self._script.tokens + HAPPENINGS_PER_ENTRY * entries

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        """What is due in the past (after a jump of the clock) happens now."""
        self._scheduled += 1
        heapq.heappush(self._agenda, (at_s, self._scheduled, act))

    def _move_clock(self, to_s: float) -> None:
        now_s = max(self._now_s, to_s)
        assert math.isfinite(now_s) and now_s >= self._now_s, "a monotonic clock"
        self._now_s = self.journal.now_s = now_s

    def _engine_still_s(self) -> float:
        return self.engine.still_s(self._now_s)

    # ---- what happens ---------------------------------------------------------------------------------

    def _arrive(self, call: Call) -> None:
        # The gateway's clock stamps the request, whenever it was sent.
        stamped = replace(call, at_s=self._now_s)
        if self.front.open(stamped) and call.deadline_s:
            self._at(
                self._now_s + call.deadline_s,
                partial(
                    self._strike, Fault(FaultKind.CANCEL, target=call.name, reason=CancelReason.DEADLINE)
                ),
            )

    def _strike(self, fault: Fault) -> None:
        self.journal.note(f"fault {fault.kind} {fault.target}")
        if fault.kind is FaultKind.COPY:
            self.engine.fail_copy()
        elif fault.kind in _FAULTS_OF_A_STEP:
            self.engine.faults.arm(fault)
        elif fault.kind is FaultKind.SLOW:
            self._slow_seen += 1
            self._slow[self._slow_seen] = fault.factor
            self._at(self._now_s + fault.seconds, partial(self._recover_speed, self._slow_seen))
            self._set_speed()
        elif fault.kind is FaultKind.JUMP:
            self._move_clock(self._now_s + fault.seconds)
        elif fault.kind is FaultKind.CANCEL:
            self.front.cancel(fault.target, fault.reason)
        elif fault.kind is FaultKind.STRAY_CANCEL:
            self._send(Cancel(fault.target, fault.reason))
        elif fault.kind is FaultKind.DRAIN:
            self.front.drain()
            self._at(self._now_s + fault.seconds, self.front.shut_down)
        elif not self.engine.is_dead:
            self.engine.kill()
            self._report_death()

    def _recover_speed(self, number: int) -> None:
        self._slow.pop(number, None)
        self._set_speed()

    def _set_speed(self) -> None:
        self.engine.cost.factor = math.prod(self._slow.values())

    def _heal(self) -> None:
        """Nothing breaks from here on; whatever is inside must end within so many steps."""
        self.journal.note("healed")
        self.engine.faults.take()
        self._slow.clear()
        self._set_speed()
        self._steps_left = STEPS_SPARE + STEPS_PER_TOKEN * self.checkers.open_work_tokens

    # ---- messages -------------------------------------------------------------------------------------

    def _send(self, command: Command) -> None:
        self._at(self._to_engine.arrival_s(self._now_s), partial(self._deliver, command))

    def _deliver(self, command: Command) -> None:
        if self.engine.is_dead:
            return
        self.engine.obey(command, self._now_s)
        if self.engine.may_begin:
            self._turn()

    def _turn(self) -> None:
        """The engine's loop goes round: take what waits, report, begin the next step."""
        engine, now_s = self.engine, self._now_s
        engine.drain(now_s)
        self._report()
        horizon_s = self._agenda[0][0] if self._agenda else math.inf
        for number, ends_s in engine.begin_steps(now_s, max(now_s, horizon_s)):
            self._count_step()
            self._at(ends_s, partial(self._end_step, number))

    def _end_step(self, number: int) -> None:
        engine = self.engine
        if engine.is_dead or not engine.is_running(number):
            return  # killed meanwhile
        if engine.complete_step(number, self._now_s):
            self._turn()
        else:
            self._report()
            self._report_death()

    def _count_step(self) -> None:
        if self._steps_left is None:
            return
        self._steps_left -= 1
        if self._steps_left < 0:
            raise CheckFailed("liveness", f"{self.checkers.open_count} requests do not end after the faults")

    def _report(self) -> None:
        events = self.engine.take_events()
        if events:
            self._at(self._to_front.arrival_s(self._now_s), partial(self._hear, events))

    def _hear(self, events: list[ReplicaEvent]) -> None:
        self.front.take(events, self._now_s)

    def _report_death(self) -> None:
        self._at(self._to_front.arrival_s(self._now_s), self.front.bury)
