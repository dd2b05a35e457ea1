"""Is the engine alive, stuck or dead? Decided from its heartbeat by our own clock. Pure."""

from __future__ import annotations

from enum import StrEnum


class EngineState(StrEnum):
    """OK also when busy or idle: the heartbeat moves either way."""

    OK = "ok"
    STUCK = "stuck"  # alive, but its loop has not turned for `stall_s`
    DEAD = "dead"


class EngineWatch:
    """Remembers when the heartbeat last moved. A busy engine beats with every step, an idle one too."""

    def __init__(self, stall_s: float, now_s: float) -> None:
        self._stall_s = stall_s
        self._last_beat = -1
        self._last_moved_s = now_s
        self._last_seen_s = now_s
        self._is_dead = False

    def observe(self, beat: int, is_alive: bool, now_s: float) -> None:
        """Take a look. When we ourselves did not look for long, the time in between says nothing."""
        blind_s = now_s - self._last_seen_s
        self._last_seen_s = now_s
        if beat != self._last_beat or blind_s > self._stall_s:
            self._last_beat, self._last_moved_s = beat, now_s
        if not is_alive:
            self._is_dead = True

    def mark_dead(self) -> None:
        self._is_dead = True

    def still_s(self, now_s: float) -> float:
        """How long the heartbeat has stood still."""
        return now_s - self._last_moved_s

    def state(self, now_s: float) -> EngineState:
        if self._is_dead:
            return EngineState.DEAD
        return EngineState.STUCK if self.still_s(now_s) > self._stall_s else EngineState.OK
