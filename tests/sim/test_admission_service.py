"""Admission by learned lengths, on the twin: after a shift, and however decode steps are told."""

from __future__ import annotations

import pytest
from benchmarks.effects.admission import KV_TOKENS, conversations, shifting
from benchmarks.effects.serving import AZURE, Load, limits, serve, settings_of

from penstock.core.request import Request
from penstock.policies.estimate.lengths import WINDOW
from penstock.twin.replica import TwinReplica


def test_after_a_shift_evictions_last_for_no_more_than_the_window() -> None:
    """Card test 3: outputs turn from 80 tokens to 600 half-way through."""
    count = 1600
    load = shifting(count, rate_rps=16.0)
    new = {request.id for request in load.requests[count // 2 :]}
    evicted_by: list[tuple[int, int]] = []  # open requests of the second half, evictions, after each end
    open_count = -1

    def look(twin: TwinReplica) -> None:
        nonlocal open_count
        if len(twin.output_lens) != open_count:
            open_count = len(twin.output_lens)
            still_open = sum(name in new for name in twin.output_lens)
            evicted_by.append((still_open, twin.replica.stats().preemptions_total))

    served = serve(load, settings_of("lightllm"), limits(KV_TOKENS), each_step=look)
    assert served.preemptions > 0, "the shift surprises"
    at_window = max(evictions for still_open, evictions in evicted_by if still_open >= len(new) - WINDOW)
    later = served.preemptions - at_window
    assert later <= 0.005 * (len(new) - WINDOW)


@pytest.mark.skipif(not AZURE.exists(), reason="the public traces are not beside the project")
@pytest.mark.parametrize("round_steps", [1, 10])
def test_the_twins_leaps_change_nothing(round_steps: int) -> None:
    load = conversations(60, 7.0)
    options = f"[policies.options.past-future]\nround_steps = {round_steps}"
    ends = []
    for repeat in (True, False):
        settings = settings_of("lightllm", options)
        served = serve(load, settings, limits(10_000, repeat=repeat))
        ends.append({name: (each.finish_s, each.output_tokens) for name, each in served.outcomes.items()})
    assert ends[0] == ends[1]


def test_shared_prefixes_let_more_run_than_their_sum() -> None:
    """40 questions about one document: charged once, they all run together."""
    keys = [f"block{i}".encode() for i in range(250)]
    requests = [
        Request(f"r{i}", 4016, 64, 0.0 if i == 0 else 1.0, block_keys=[*keys, f"own{i}".encode()])
        for i in range(40)
    ]
    most = 0

    def look(twin: TwinReplica) -> None:
        nonlocal most
        most = max(most, twin.replica.running_count)

    served = serve(Load(requests), settings_of("lightllm"), limits(16_000), each_step=look)
    assert most > 25 and served.preemptions == 0
