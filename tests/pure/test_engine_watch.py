"""Alive, stuck or dead, told from a heartbeat and two clocks' worth of silence."""

from __future__ import annotations

from penstock.gateway.health import EngineState, EngineWatch


def test_a_moving_heart_is_healthy_however_long() -> None:
    watch = EngineWatch(stall_s=10.0, now_s=0.0)
    for beat in range(100):
        watch.observe(beat, True, now_s=9.0 * beat)
        assert watch.state(9.0 * beat) is EngineState.OK


def test_a_heart_that_stands_still_is_stuck_and_recovers() -> None:
    watch = EngineWatch(stall_s=10.0, now_s=0.0)
    for second in range(12):
        watch.observe(7, True, float(second))
    assert watch.state(11.0) is EngineState.STUCK
    watch.observe(8, True, 12.0)
    assert watch.state(12.0) is EngineState.OK


def test_our_own_absence_is_not_held_against_the_engine() -> None:
    watch = EngineWatch(stall_s=10.0, now_s=0.0)
    watch.observe(7, True, 0.0)
    watch.observe(7, True, 60.0)  # the process was stopped, or its loop was blocked
    assert watch.state(60.0) is EngineState.OK
    watch.observe(7, True, 65.0)
    watch.observe(7, True, 71.0)
    assert watch.state(71.0) is EngineState.STUCK


def test_dead_is_for_ever() -> None:
    watch = EngineWatch(stall_s=10.0, now_s=0.0)
    watch.observe(1, False, 1.0)
    watch.observe(2, True, 2.0)
    assert watch.state(2.0) is EngineState.DEAD
