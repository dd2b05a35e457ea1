"""Laws of every fair and prioritising rank, on random loads: leaps change nothing, nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cost_models import PlainCost
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.metrics import RequestOutcome, Slo
from penstock.core.request import Request
from penstock.core.settings import PolicySettings, Settings, TenantSettings
from penstock.replica.limits import ReplicaLimits
from penstock.twin.replica import PathCosts, TwinReplica

RANKS = ["priority", "edf", "shortest-predicted", "vtc", "uwfq", "jitserve", "fastswitch"]
LIMITS = ReplicaLimits(
    kv_blocks=40, kv_block_tokens=4, running_max=3, step_tokens_max=16, context_len_max=150, repeat=True
)
# Small margins, so that the short runs here displace somebody.
OPTIONS: dict[str, dict[str, Any]] = {
    "vtc": {"swap_margin_tokens": 20},
    "uwfq": {"swap_margin_tokens": 20},
    "jitserve": {"schedule_steps": 7},
    "fastswitch": {"interval_steps": 5},
    "priority": {"boost_tokens": 5, "step_max": 2, "request_max": 3},
}


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Request], dict[str, int]]:
    requests, output_lens, now_s = [], {}, 0.0
    for index in range(draw(st.integers(1, 12))):
        now_s += draw(st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.5]))
        output = draw(st.integers(1, 60))
        request = Request(
            f"r{index}",
            draw(st.integers(1, 60)),
            output,
            now_s,
            tenant=draw(st.sampled_from("abc")),
            slo_class=draw(st.sampled_from(["chat", "batch", "default"])),
            priority=draw(st.integers(-1, 1)),
            program_id=draw(st.sampled_from([None, None, "p", "q"])),
        )
        requests.append(request)
        if draw(st.booleans()):
            output_lens[request.id] = draw(st.integers(1, output))
    return requests, output_lens


def run(
    load: tuple[list[Request], dict[str, int]], rank: str, preempt: str, limits: ReplicaLimits
) -> tuple[list[tuple[object, ...]], int]:
    outcomes: list[RequestOutcome] = []
    chosen = Settings(
        policies=PolicySettings(rank=rank, preempt=preempt, options=OPTIONS),
        slo={"chat": Slo(ttft_ms=50.0, tpot_ms=10.0), "batch": Slo(e2e_ms=900.0)},
        tenants={"b": TenantSettings(2.0)},
    )
    twin = TwinReplica(chosen, limits, PlainCost(), PathCosts(), outcomes.append)
    requests, output_lens = load
    twin.output_lens.update(output_lens)
    for request in requests:
        twin.arrive(request)
    twin.finish()
    twin.replica.check_invariants()
    assert not twin.replica.has_work
    found = [
        (o.request_id, o.finish, o.first_token_s, o.last_token_s, o.finish_s, o.output_tokens)
        for o in outcomes
    ]
    assert {outcome[0] for outcome in found} == {request.id for request in requests}
    return found, twin.replica.stats().preemptions_total


@given(
    load=loads(),
    rank=st.sampled_from(RANKS),
    preempt=st.sampled_from(["priority", "youngest-recompute"]),
    kv_blocks=st.integers(32, 60),
)
@settings(max_examples=200, deadline=None)
def test_leaps_change_nothing(
    load: tuple[list[Request], dict[str, int]], rank: str, preempt: str, kv_blocks: int
) -> None:
    limits = replace(LIMITS, kv_blocks=kv_blocks)
    assert run(load, rank, preempt, limits) == run(load, rank, preempt, replace(limits, repeat=False))


def test_the_loads_displace_somebody_under_every_rank() -> None:
    """So that the law above is about something."""
    counts = dict.fromkeys(RANKS, 0)

    @given(load=loads())
    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    def count(load: tuple[list[Request], dict[str, int]]) -> None:
        for rank in RANKS:
            counts[rank] += run(load, rank, "priority", LIMITS)[1]

    count()
    assert all(counts.values()), counts
