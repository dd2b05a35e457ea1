"""The twin against eight H100: our own scheduler on modelled steps, beside vLLM's published mean TPOTs."""

from __future__ import annotations

import random

import pytest
from benchmarks.fit_engine import DEVICES, PLANS, RUNS, Run, models

from penstock.core.metrics import RequestOutcome
from penstock.core.settings import DeskSettings, Settings
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs.hardware import load_engine
from penstock.twin.replica import PathCosts
from penstock.twin.simulate import simulate
from penstock.workloads.trace import TraceRow

REQUESTS = 300
LIMITS = ReplicaLimits(
    kv_blocks=20_000, kv_block_tokens=16, running_max=256, step_tokens_max=512, context_len_max=8192
)


def poisson_rows(run: Run, seed: int) -> list[TraceRow]:
    """Poisson arrivals at the run's rate; all requests have its mean lengths."""
    stream = random.Random(seed)
    prompt, output = round(run.prompt_tokens / run.requests), round(run.output_tokens / run.requests)
    rows, now_s = [], 0.0
    for _ in range(REQUESTS):
        now_s += stream.expovariate(run.rate_rps)
        rows.append(TraceRow(now_s, prompt, output))
    return rows


def simulated_tpot_ms(run: Run, width: int) -> float:
    engine = load_engine("vllm-2024")
    outcomes: list[RequestOutcome] = []
    simulate(
        poisson_rows(run, seed=7),
        Settings(desk=DeskSettings(queue_wait_s_max=1e6)),
        LIMITS,
        models(engine)[width],
        outcomes.append,
        replicas=DEVICES // width,
        path=PathCosts(to_engine_s=engine.request_s),
    )
    times = [outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None]
    assert len(times) == REQUESTS
    return sum(times) / len(times) * 1e3


@pytest.mark.parametrize("width", PLANS)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_mean_tpot_within_ten_percent(run: Run, width: int) -> None:
    """Card apex, test 1: the overheads were fitted to four of these eighteen."""
    assert simulated_tpot_ms(run, width) == pytest.approx(run.tpot_ms[PLANS.index(width)], rel=0.10)
