"""Whole engines: eighteen published mean TPOTs of eight H100, four of which were used for calibration."""

from __future__ import annotations

import pytest
from benchmarks.fit_engine import (
    DEVICES,
    FITTED_PLANS,
    PLANS,
    RUNS,
    mean_tpot_s,
    models,
    predictions,
    prompt_s,
)

from penstock.twin.costs.hardware import load_engine

ENGINE = load_engine("vllm-2024")


def test_eighteen_mean_tpots_within_ten_percent() -> None:
    """Card apex, test 1, in closed form; `tests/sim/test_apex_tpot.py` simulates it."""
    found = list(predictions(ENGINE))
    assert len(found) == 18
    assert sum(run.is_fitted and width in FITTED_PLANS for run, width, _, _ in found) == 4
    for run, width, predicted_ms, measured_ms in found:
        assert predicted_ms == pytest.approx(measured_ms, rel=0.10), (run.name, width)


def test_plans_rank_as_measured() -> None:
    """Card apex, test 2: TP8 before 2 x TP4 before 4 x TP2, on every trace."""
    built = models(ENGINE)
    for run in RUNS:
        times = [mean_tpot_s(built[width], run, width) for width in PLANS]
        assert times == sorted(times), run.name
        assert list(run.tpot_ms) == sorted(run.tpot_ms)


def test_time_to_first_token_of_long_and_short_prompts() -> None:
    """Mean TTFTs on a nearly idle engine: 2,800 prompt tokens 231 | 276 | 373 ms, 74 tokens 37 | 35 | 47 ms.

    Waiting for the running step and for other prompts is not in here, so they may only come out lower.
    """
    built = models(ENGINE)
    for tokens, measured_ms in ((2800, (231, 276, 373)), (74, (37, 35, 47))):
        for width, expected_ms in zip(PLANS, measured_ms, strict=True):
            predicted_ms = (prompt_s(built[width], tokens) + ENGINE.request_s) * 1e3
            assert 0.75 * expected_ms < predicted_ms < 1.1 * expected_ms, (tokens, width)
    assert DEVICES == 8


def test_context_and_batch_matter() -> None:
    """Decode costs that forget either would predict the same TPOT for these."""
    run = next(run for run in RUNS if run.name == "creation_05")
    slow = next(run for run in RUNS if run.name == "creation_025")
    model = models(ENGINE)[8]
    assert mean_tpot_s(model, run, 8) > 1.08 * mean_tpot_s(model, slow, 8)
