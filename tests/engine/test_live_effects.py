"""What effects are measured with on the CPU engine: real tokens, real time, the twin's plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.effects.live import serve_live
from benchmarks.effects.serving import Load, limits, settings_of

from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.twin.exact import replay_journal

SHARED = [b"first", b"second"]
LOAD = Load(
    [Request(f"r{index}", 36 + 9 * index, 6, 0.4 * index, block_keys=SHARED) for index in range(5)],
    {"r3": 2},
)


@pytest.mark.model
def test_a_load_is_served_as_it_says(tmp_path: Path) -> None:
    runs = {}
    for compose in ("sarathi", "prefill-first"):
        path = tmp_path / f"{compose}.jsonl"
        served = runs[compose] = serve_live(LOAD, settings_of(compose=compose), limits(2000), journal=path)
        replayed = replay_journal(path)
        assert replayed.difference is None and replayed.plans == served.steps == len(served.step_rows)
        assert {name: outcome.output_tokens for name, outcome in served.outcomes.items()} == {
            "r0": 6, "r1": 6, "r2": 6, "r3": 2, "r4": 6
        }  # fmt: skip
        assert served.outcomes["r3"].finish is FinishReason.STOP
        assert served.outcomes["r4"].cached_tokens == 32, "equal keys are equal tokens"
        assert served.mean_place(["r0"]) == 1.0 and served.mean_place(list(served.outcomes)) == 3.0
        assert len(served.gaps_s()) == 4 * 5 + 1
        assert all(outcome.ttft_s > 0 for outcome in served.outcomes.values() if outcome.ttft_s is not None)
    assert runs["sarathi"].tokens == runs["prefill-first"].tokens, "outputs do not depend on scheduling"


@pytest.mark.model
def test_kv_goes_to_the_host_and_comes_back() -> None:
    load = Load([Request(f"r{index}", 32, 40, 0.0) for index in range(4)])
    roomy = serve_live(load, settings_of(), limits(2000))
    sizes = limits(192, prefix_cache=False, host_kv_blocks=32)
    swapped = serve_live(load, settings_of(preempt="swap"), sizes)
    assert swapped.preemptions and not sum(swapped.stats.preempted_tokens_total.values())
    assert swapped.tokens == roomy.tokens
    assert serve_live(load, settings_of(), limits(192)).tokens == roomy.tokens, "the host's KV is gone again"
