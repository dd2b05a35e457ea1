"""The arithmetic of `penstock fidelity`: errors, spread, capacity, rates."""

from __future__ import annotations

import pytest

from penstock.cli.fidelity import parse_numbers
from penstock.core.errors import ConfigError, TraceError
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import FinishReason
from penstock.twin.fidelity import at_rate, capacity_rps, errors_between, trace_rps, warmup_end_s
from penstock.workloads.trace import TraceRow


def outcome(arrival_s: float, e2e_s: float) -> RequestOutcome:
    end_s = arrival_s + e2e_s
    return RequestOutcome(
        "r",
        arrival_s,
        FinishReason.LENGTH,
        end_s,
        5,
        3,
        first_token_s=arrival_s + e2e_s / 2,
        last_token_s=end_s,
    )


def test_errors_are_of_the_same_statistic() -> None:
    live = [outcome(float(i), 1.0 + i) for i in range(5)]
    twin = [outcome(float(i), 1.1 * (1.0 + i)) for i in range(5)]
    found = errors_between([live], twin)
    assert all(error.frac == pytest.approx(0.1) for one in found.values() for error in one.values())
    assert found["e2e"]["p50"].live_ms == pytest.approx(3000) and found["tpot"]["mean"].live_ms == 750
    assert errors_between([live], []) == {}


def test_repeated_replays_show_the_machines_own_spread() -> None:
    slow, fast = ([outcome(float(i), e2e_s) for i in range(5)] for e2e_s in (1.2, 0.8))
    error = errors_between([slow, fast], slow)["e2e"]["mean"]
    assert (error.live_ms, error.twin_ms) == (pytest.approx(1000), pytest.approx(1200))
    assert error.spread_frac == pytest.approx(0.2)
    assert errors_between([slow], slow)["e2e"]["mean"].spread_frac is None


def test_capacity_leaves_the_tail_of_a_burst_out() -> None:
    burst = [outcome(0.0, 1.0 + i) for i in range(9)] + [outcome(0.0, 1000.0)]
    assert capacity_rps(burst) == pytest.approx(1.0)
    with pytest.raises(TraceError, match="unknown"):
        capacity_rps([RequestOutcome("r", 0.0, FinishReason.REFUSED, 0.0)])


def test_rates_and_warm_up() -> None:
    rows = [TraceRow(float(i), 5, 5) for i in range(11)]
    assert trace_rps(rows) == 1.0 and trace_rps(at_rate(rows, 4.0)) == 4.0
    assert warmup_end_s(rows, 1.0) == 1.0 and warmup_end_s(rows, 100.0) == 2.0
    with pytest.raises(TraceError, match="span no time"):
        trace_rps(rows[:1])


def test_numbers_as_written() -> None:
    assert parse_numbers("--loads", "0.5, 1") == [0.5, 1.0]
    for text in ("", "x", "0", "nan", "inf", "-1", ",".join("1" * 20)):
        with pytest.raises(ConfigError, match="--loads"):
            parse_numbers("--loads", text)
