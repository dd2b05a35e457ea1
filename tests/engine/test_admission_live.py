"""Past-Future admission on the real CPU engine, when lengths are known (card past-future, test 4)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_model import TinyEngine, write_tiny_llama

from penstock.core.request import Request, SamplingParams
from penstock.core.settings import PolicySettings
from penstock.policies.admit.past_future import PastFuture
from penstock.policies.estimate.peak import future_peak
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

BLOCKS = 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return TinyEngine(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny"), torch.float32, "paged-cpu")


def mixed() -> list[Request]:
    draw, requests = random.Random(4), []
    for index in range(40):
        prompt = [draw.randrange(3, 128) for _ in range(draw.randint(4, 90))]
        requests.append(
            Request(
                f"r{index}", len(prompt), draw.randint(2, 60), 0.0, prompt_tokens=prompt,
                sampling=SamplingParams(temperature=0.0),
            )
        )  # fmt: skip
    return requests


@pytest.mark.usefixtures("known_lengths")
def test_nobody_is_evicted_and_the_peak_is_what_is_held(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All prompts fit a step, so that all decode every step, and the formula is exact to the token."""
    peaks: list[int] = []
    fits = PastFuture._fits

    def noting(self: PastFuture, candidate: Any, view: Any) -> bool:
        answer = fits(self, candidate, view)
        if answer:  # the same without the rounding to blocks
            held = self._batch.held(view.decode_clock, 1)
            peaks.append(int(future_peak(held, self._batch.left(held, 1))[0]))
        return answer

    monkeypatch.setattr(PastFuture, "_fits", noting)
    executor = engine.executor(BLOCKS)
    options = {"past-future": {"reserved_frac": 0.0, "round_steps": 1}}
    policies = PolicySettings(admit="past-future", options=options)
    replica = Replica(ReplicaLimits(BLOCKS, 16, 40, 4096, 512), make_stack(policies))
    for request in mixed():
        replica.submit(request, 0.0)
    held, step = 0, 0
    while replica.has_work:
        plan = replica.plan(float(step))
        assert plan is not None
        held = max(held, sum(each.computed_len for each in replica.running) + plan.token_count)
        replica.complete(plan, executor.execute(plan), step + 0.5)
        replica.check_invariants()
        step += 1
    assert replica.stats().preemptions_total == 0
    assert held > 0.7 * BLOCKS * 16, "the pool was used"
    assert max(peaks) == held
