"""Continuum in the twin: a program that never returns does not hold up the others (card, test 4)."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.effects._agents import AgentsServed, serve_agents
from benchmarks.effects.continuum import KV_TOKENS, programs, with_rule
from benchmarks.effects.serving import limits

from penstock.workloads.trace import TraceRow


def others_rate(rows: list[TraceRow], served: AgentsServed, name: str) -> float:
    """Programs a second, that one left out."""
    ends = [end.finish_s for number, end in served.outcomes.items() if rows[number].session_id != name]
    return (len(served.job_s) - 1) / max(ends)


def test_a_program_that_never_returns_starves_nobody() -> None:
    """Many programs: with few, another order of the last of them alone moves the rate by 3 %."""
    rows = programs(250)
    name = "program-5"
    stays_away = [row for row in rows if row.session_id != name or row.turn == 0]
    says_so = [replace(row, is_last_turn=True) if row.session_id == name else row for row in stays_away]
    sizes = limits(KV_TOKENS)
    silent, told = (serve_agents(each, with_rule("cdf"), sizes) for each in (stays_away, says_so))
    assert silent.stats.pins == 0, "its pin is gone by the end"
    assert silent.stats.pins_total["made"] > told.stats.pins_total["hit"] > 0
    assert silent.stats.pins_total["expired"] > told.stats.pins_total["expired"]
    ratio = others_rate(stays_away, silent, name) / others_rate(says_so, told, name)
    assert abs(ratio - 1.0) <= 0.02
