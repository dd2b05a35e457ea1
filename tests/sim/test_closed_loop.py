"""Clients that wait for answers: think times, the cap on requests in flight, and the series over time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cost_models import PlainCost
from hypothesis import given, settings
from hypothesis import strategies as st
from test_twin import LIMITS

from penstock.core.errors import TraceError
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import FinishReason
from penstock.core.settings import Settings
from penstock.twin.replica import TwinReplica
from penstock.twin.sampling import POINTS_SHOWN, Sampler, resampled
from penstock.twin.simulate import Clients, series_of, simulate
from penstock.workloads import sessions
from penstock.workloads.sessions import SessionLoop
from penstock.workloads.trace import TraceRow


def run(
    load: list[TraceRow], clients: Clients, replicas: int = 1, repeat: bool = True
) -> tuple[dict[str, RequestOutcome], list[TwinReplica]]:
    outcomes: list[RequestOutcome] = []
    limits = replace(LIMITS, repeat=repeat)
    fleet = simulate(
        load, Settings(), limits, PlainCost(), outcomes.append, replicas=replicas, clients=clients
    )
    for twin in fleet:
        twin.replica.check_invariants()
        assert not twin.replica.has_work
    assert len({o.request_id for o in outcomes}) == len(outcomes) == sum(not row.failed for row in load)
    return {o.request_id: o for o in outcomes}, fleet


def facts(found: dict[str, RequestOutcome]) -> list[tuple[object, ...]]:
    return [
        (key, o.arrival_s, o.first_token_s, o.last_token_s, o.finish_s, o.cached_tokens)
        for key, o in sorted(found.items())
    ]


loads = st.lists(
    st.builds(
        TraceRow,
        arrival_s=st.floats(0.0, 0.5),
        prompt_tokens=st.integers(1, 60),
        output_tokens=st.integers(1, 40),
        session_id=st.sampled_from([None, "a", "b", "c"]),
    ),
    min_size=1,
    max_size=14,
).map(lambda rows: sorted(rows, key=lambda row: row.arrival_s))


def test_a_turn_waits_for_the_answer_and_for_its_user() -> None:
    load = [
        TraceRow(0.0, 20, 30, session_id="s", elapsed_s=0.5),
        TraceRow(2.0, 40, 5, session_id="s"),
        TraceRow(2.5, 10, 5),
    ]
    found, _ = run(load, Clients(closed_loop=True))
    assert found["r1"].arrival_s == pytest.approx(found["r0"].finish_s + 1.5)
    assert found["r2"].arrival_s == 2.5, "a request without a session stays where it was"
    assert found["r1"].cached_tokens == 20, "the longer turn finds the blocks of the one before"


def test_rate_scaling_leaves_think_times_alone() -> None:
    load = [TraceRow(0.0, 8, 4, session_id="s"), TraceRow(1.0, 16, 4, session_id="s")]
    found, _ = run(load, Clients(closed_loop=True, rate_scale=3.0))
    assert found["r1"].arrival_s == pytest.approx(found["r0"].finish_s + 3.0)


def test_a_refused_turn_is_followed_by_the_next() -> None:
    load = [TraceRow(0.0, 500, 4, session_id="s"), TraceRow(1.0, 16, 4, session_id="s")]
    found, _ = run(load, Clients(closed_loop=True))
    assert found["r0"].finish is FinishReason.REFUSED and found["r0"].error_code == "context_length_exceeded"
    assert found["r1"].is_answered and found["r1"].arrival_s == 1.0


@given(load=loads, cap=st.one_of(st.none(), st.integers(1, 4)), closed=st.booleans())
@settings(max_examples=80, deadline=None)
def test_leaps_change_nothing_in_a_closed_loop(load: list[TraceRow], cap: int | None, closed: bool) -> None:
    clients = Clients(closed_loop=closed, concurrency_max=cap)
    for replicas in (1, 2):
        with_leaps, _ = run(load, clients, replicas)
        without, _ = run(load, clients, replicas, repeat=False)
        assert facts(with_leaps) == facts(without)


@given(load=loads, cap=st.integers(1, 3), replicas=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_never_more_in_flight_than_the_cap(load: list[TraceRow], cap: int, replicas: int) -> None:
    """Whoever has a first token has been sent; so many at most lie between that and the end."""
    found, _ = run(load, Clients(concurrency_max=cap), replicas)
    spans = [(o.first_token_s, o.finish_s) for o in found.values() if o.first_token_s is not None]
    for at_s, _ in spans:
        assert sum(first <= at_s < end for first, end in spans) <= cap
    for outcome in found.values():
        assert outcome.arrival_s == load[int(outcome.request_id[1:])].arrival_s


@given(load=loads, replicas=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_a_wide_cap_is_an_open_loop(load: list[TraceRow], replicas: int) -> None:
    """The event loop and the fast path agree to the bit."""
    capped, _ = run(load, Clients(concurrency_max=1000), replicas)
    free, _ = run(load, Clients(), replicas)
    assert facts(capped) == facts(free)


def test_one_at_a_time_is_one_at_a_time() -> None:
    load = [TraceRow(0.0, 10, 10) for _ in range(5)]
    found, _ = run(load, Clients(concurrency_max=1), replicas=2)
    ordered = sorted(found.values(), key=lambda outcome: outcome.finish_s)
    for earlier, later in zip(ordered, ordered[1:], strict=False):
        assert later.first_token_s is not None and later.first_token_s > earlier.finish_s


def test_too_many_rows_for_a_closed_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CLOSED_LOOP_ROWS_MAX", 3)
    with pytest.raises(TraceError, match="at most 3"):
        SessionLoop((TraceRow(float(i), 1, 1) for i in range(4)), 1.0)


def test_the_series_shows_the_run() -> None:
    load = [TraceRow(0.01 * i, 30, 30) for i in range(60)]
    found, fleet = run(load, Clients(), replicas=2)
    series = series_of(fleet)
    assert len(series.t_s) == POINTS_SHOWN and series.t_s[-1] <= max(o.finish_s for o in found.values())
    running = [value for value in series.running if value is not None]
    waiting = [value for value in series.waiting if value is not None]
    kv_frac = [value for value in series.kv_usage_frac if value is not None]
    assert 0 < max(running) <= 2 * LIMITS.running_max and max(waiting) > 0
    assert 0 < max(kv_frac) <= 1
    assert (running[-1], waiting[-1], kv_frac[-1]) == (0, 0, 0)
    assert series.counters["preemptions"] == sum(twin.replica.stats().preemptions_total for twin in fleet)


def test_a_series_is_bounded_and_keeps_its_span() -> None:
    sampler = Sampler(points_max=16)
    now_s = 0.0
    for step in range(100_000):
        now_s = step * 0.01
        if now_s >= sampler.due_s:
            sampler.take(now_s, step, 0, 0.5)
    assert len(sampler.series.t_s) < 16 and sampler.series.t_s[0] == 0.0
    assert now_s - sampler.series.t_s[-1] < now_s / 4


def test_resampling_holds_the_last_value() -> None:
    import numpy as np

    found = resampled([1.0, 2.0], [5.0, None], np.array([0.5, 1.0, 1.9, 2.5]))
    assert found.tolist() == [0.0, 5.0, 5.0, 0.0]


@pytest.mark.parametrize("closed", [False, True])
def test_requests_may_ask_for_more_than_they_use(closed: bool) -> None:
    """Asked for 50 tokens each, they end where the recorded ones did, and nothing is late for it."""
    load = [TraceRow(0.1 * i, 20, 5 + i, session_id=f"s{i % 3}") for i in range(9)]
    exact, _ = run(load, Clients(closed_loop=closed))
    asking, _ = run(load, Clients(closed_loop=closed, asked_tokens=50))
    assert exact.keys() == asking.keys() and len(exact) == 9
    for name, outcome in asking.items():
        assert outcome.finish is FinishReason.STOP and outcome.output_tokens == exact[name].output_tokens
        assert outcome.finish_s == exact[name].finish_s
