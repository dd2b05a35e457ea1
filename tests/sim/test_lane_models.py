"""What the cards of semi-PD and Nexus ask for beyond the effects: fits, terms of the model, switches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from benchmarks.effects._lanes import Watch, a100, drawn, l20, laned, run, with_arrivals
from benchmarks.effects.serving import Load, Served, limits, serve

from penstock.core.request import Request
from penstock.policies.lanes.latency_fits import fit_queue, fit_speed, r_squared
from penstock.twin.laned import LanedTwin

SHARES = (0.3, 0.35, 0.4, 0.5, 0.6, 0.75, 0.9)


def _even_load(rate_rps: float, count: int) -> Load:
    draw = random.Random("fit/2")
    found = with_arrivals(
        draw, count / rate_rps, lambda _: (rate_rps, 16 + int(draw.expovariate(1 / 700.0)), 40)
    )
    return found


def test_ttft_and_tpot_follow_the_fitted_models() -> None:
    """Card semi-pd, test 3: a sweep of the prefill share, and both fits explain 97 % of what it gives.

    One prompt a step, so that the prefill lane is the queue that the model speaks of.
    """
    load = _even_load(1.5, 900)
    ttfts, tpots = [], []
    for share in SHARES:
        options = {"prefill_frac": share, "decode_frac": round(1.0 - share, 6)}
        sizes = limits(a100().kv_tokens_max(), step_tokens_max=4096, running_max=512)
        served = serve(load, laned("static", options, compose="prefill-first"), sizes, a100())
        ttfts.append((share, float(served.values("ttft_s").mean())))
        tpots.append((1.0 - share, float(served.values("tpot_s").mean())))
    assert r_squared(ttfts, fit_queue(ttfts, 0.0, 0.0)) >= 0.97
    assert r_squared(tpots, fit_speed(tpots)) >= 0.97


def _crowded(contention: bool) -> Served:
    """Short chunks read the weights often, and draw a good part of the bandwidth that the decodes need."""
    draw = random.Random("crowd/1")
    load = with_arrivals(
        draw, 60.0, lambda _: (2.5, drawn(draw, 1500.0, 0.5, 16, 8000), drawn(draw, 300.0, 0.4, 8, 900))
    )
    options = {"contention": contention, "step_frac": 0.02, "dead_band_frac": 0.0, "decode_slack_frac": 0.5}
    return run(load, laned("nexus", options), step_tokens=256, cost=l20())


def test_a_model_without_contention_misses_the_decode_limit_more_often() -> None:
    """Card nexus, test 3, first half: the world contends either way, only the policy's model does not."""
    gaps = {contention: _crowded(contention).gaps_s() for contention in (True, False)}
    limit_s = float(np.quantile(gaps[True], 0.95))
    misses = {contention: float((values > limit_s).mean()) for contention, values in gaps.items()}
    assert misses[False] >= 1.2 * misses[True]


def test_no_token_is_lost_across_switches() -> None:
    """Both policies switch many times; every request still has all of its tokens, in order."""
    draw = random.Random("switch/1")
    load = with_arrivals(
        draw, 30.0, lambda now_s: (4.0, 200 if int(now_s) % 4 < 2 else 3000, drawn(draw, 60.0, 0.5, 2, 300))
    )
    targets = {"window_steps": 20, "ttft_ms": 200.0, "tpot_ms": 20.0, "switch_s": 0.3}
    for name, options in (("semi-pd", targets), ("nexus", {})):
        watch = Watch()
        served = run(load, laned(name, options), each_step=watch)
        assert isinstance(served.twin, LanedTwin)
        assert len(watch.shares) > 5
        for request in load.requests:
            outcome = served.outcomes[request.id]
            assert outcome.output_tokens == request.max_output_tokens
            assert len(outcome.itl_s) == request.max_output_tokens - 1
            assert all(gap > 0.0 for gap in outcome.itl_s)


def test_runs_repeat() -> None:
    load = _even_load(4.0, 100)
    first, second = (run(load, laned("nexus")) for _ in range(2))
    assert [(o.finish_s, list(o.itl_s)) for o in first.outcomes.values()] == [
        (o.finish_s, list(o.itl_s)) for o in second.outcomes.values()
    ]


def test_a_lane_alone_is_as_fast_as_no_lanes() -> None:
    """One request: prefill and decode never overlap, and nexus gives each of them everything."""
    load = Load([Request("r", 1000, 50, 0.0)])
    lanes = run(load, laned("nexus")).outcomes["r"]
    plain = run(load, laned("none")).outcomes["r"]
    assert lanes.finish_s == pytest.approx(plain.finish_s, rel=1e-9)
