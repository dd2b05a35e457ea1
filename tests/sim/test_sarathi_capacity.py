"""Card sarathi-serve, test 2: what a replica carries at a target for the P99 gap, by the budget of a step.

Capacity is the rate up to which the P99 gap holds the target and the median TTFT 2 s. Llama-3-8B, 600 of
Azure's conversations, 100 ms: the card has 5.8 requests/s for prefill-first and 20.1 for 512 tokens, and asks
for 2.5 times. On an A100 it is so; on an H100, where a whole prompt takes less than 100 ms, it is twice.
"""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.effects.serving import AZURE, azure_lengths, limits, llama_8b, poisson, serve, settings_of

REQUESTS = 600
TTFT_S = 2.0


def holds(compose: str, step_tokens: int, rate_rps: float, gap_ms: float, hardware: str = "h100-sxm") -> bool:
    load = poisson(azure_lengths()[:REQUESTS], rate_rps)
    sizes = limits(400_000, step_tokens_max=step_tokens, running_max=128)
    served = serve(load, settings_of(compose=compose), sizes, llama_8b(hardware))
    p99_ms = float(np.quantile(served.gaps_s(), 0.99)) * 1e3
    return p99_ms <= gap_ms and float(np.median(served.values("ttft_s"))) <= TTFT_S


pytestmark = pytest.mark.skipif(not AZURE.exists(), reason="the public traces are not beside the project")


def test_stall_free_batches_carry_more_at_the_same_gap() -> None:
    assert holds("sarathi", 512, 9.5, 100.0, "a100-80g")
    assert not holds("prefill-first", 8192, 3.8, 100.0, "a100-80g")
    assert holds("sarathi", 512, 29.0, 100.0)
    assert not holds("prefill-first", 8192, 16.0, 100.0)


def test_a_tight_target_wants_a_small_budget() -> None:
    assert holds("sarathi", 512, 26.0, 20.0)
    assert not holds("sarathi", 1024, 4.0, 20.0)
    assert not holds("sarathi", 2048, 4.0, 20.0)


def test_a_budget_below_the_knee_carries_less() -> None:
    assert not holds("sarathi", 256, 26.0, 100.0) and holds("sarathi", 256, 16.0, 20.0)
