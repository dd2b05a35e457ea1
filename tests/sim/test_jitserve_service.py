"""JITServe on whole replicas: just in time, near the optimum, bounded swaps, the same however told."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from benchmarks.effects.serving import Load, limits, serve, settings_of
from fake_executor import FakeExecutor

from penstock.core.events import Finished, Preempted
from penstock.core.metrics import Slo
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.policies.context import ServiceTerms
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

STEP_S = 0.01
PROMPT = 8


def make(running_max: int, schedule_steps: int = 10, repeat: bool = True, **options: Any) -> Replica:
    table = {"schedule_steps": schedule_steps, "step_ms": STEP_S * 1e3} | options
    policies = PolicySettings(rank="jitserve", preempt="priority", options={"jitserve": table})
    sizes = ReplicaLimits(2000, 4, running_max, 64, 4096, repeat=repeat)
    return Replica(sizes, make_stack(policies, ServiceTerms()))


def request(name: str, output: int, arrival_s: float = 0.0, **hints: Any) -> Request:
    """Its output runs to its maximum, which is what a cold belief expects: lengths are known."""
    tokens = [random.Random(name).randrange(1000) for _ in range(PROMPT)]
    return Request(name, PROMPT, output, arrival_s, prompt_tokens=tokens, **hints)


def drive(
    replica: Replica, requests: Sequence[Request], executor: FakeExecutor | None = None
) -> tuple[dict[str, float], list[list[Any]]]:
    """Every step takes `STEP_S`. When each ended, and the events of each step."""
    executor, waiting, now_s = executor or FakeExecutor(4), sorted(requests, key=lambda r: r.arrival_s), 0.0
    ends_s: dict[str, float] = {}
    told: list[list[Any]] = []
    while waiting or replica.has_work:
        while waiting and waiting[0].arrival_s <= now_s:
            replica.submit(waiting.pop(0), now_s)
        plan = replica.plan(now_s)
        now_s = round(now_s + STEP_S, 9)
        events = [] if plan is None else replica.complete(plan, executor.execute(plan), now_s)
        told.append(events)
        ends_s |= {event.request_id: event.at_s for event in events if isinstance(event, Finished)}
    assert len(ends_s) == len(requests), "what is late is served last, and not dropped"
    return ends_s, told


def test_a_job_with_slack_waits_and_is_in_time() -> None:
    """Card test 3: one place, a stream of urgent chats, and a job that is due in 20 seconds."""
    job = request("job", 400, slo=Slo(e2e_ms=20_000))  # four seconds of work
    chats = [request(f"chat{i}", 60, 0.6 * i, slo=Slo(ttft_ms=500, tpot_ms=50)) for i in range(40)]
    replica = make(1)
    steps_of_job: list[int] = []

    class Watching(FakeExecutor):
        def execute(self, plan: Any) -> Any:
            if any(each.request.id == "job" for each in replica.running):
                steps_of_job.append(len(self.plans))
            return super().execute(plan)

    ends_s, _ = drive(replica, [*chats, job], Watching(4))
    tight = (20.0 - 2 * 4.0) / STEP_S  # its slack equals its work
    early = sum(step < tight for step in steps_of_job)
    assert early < 0.1 * tight
    assert ends_s["job"] <= 20.0


def optimum(requests: Sequence[Request]) -> float:
    """Most weighted tokens in time on one place, all there from the start: every subset, by deadline."""
    ordered = sorted(requests, key=lambda each: each.slo.e2e_ms)  # type: ignore[union-attr, arg-type, return-value]
    best = 0.0
    for chosen in itertools.product((0, 1), repeat=len(ordered)):
        now_s = value = 0.0
        for taken, each in zip(chosen, ordered, strict=True):
            now_s += taken * each.max_output_tokens * STEP_S
            if taken and now_s > due_s(each):
                break
            value += taken * worth(each)
        else:
            best = max(best, value)
    return best


def due_s(each: Request) -> float:
    assert each.slo is not None and each.slo.e2e_ms is not None
    return each.slo.e2e_ms * 1e-3


def worth(each: Request) -> float:
    return each.prompt_len + 8 * each.max_output_tokens


def instance(seed: int) -> list[Request]:
    """12 requests that would take 1.5 times as long as they have."""
    draw = random.Random(seed)
    outputs = [draw.randint(20, 200) for _ in range(12)]
    span_ms = sum(outputs) * STEP_S * 1e3 / 1.5
    return [
        request(f"r{i}", output, slo=Slo(e2e_ms=max(output * 12.0, draw.uniform(0.1, 1.0) * span_ms)))
        for i, output in enumerate(outputs)
    ]


def test_with_known_lengths_it_is_near_the_optimum() -> None:
    """Card test 2: within 10 % over ten instances of 12 requests."""
    ours = best = 0.0
    for seed in range(10):
        requests = instance(seed)
        ends_s, _ = drive(make(1), requests)
        ours += sum(worth(each) for each in requests if ends_s[each.id] <= due_s(each) + 1e-9)
        best += optimum(requests)
    assert ours >= 0.9 * best


def mixed(count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    promises = [Slo(ttft_ms=300, tpot_ms=40), Slo(e2e_ms=2000), Slo(e2e_ms=3000), None]
    return [
        request(
            f"r{i}",
            draw.randint(5, 80),
            round(draw.uniform(0, 3), 2),
            slo=draw.choice(promises),
            program_id=f"p{i // 3}" if i % 2 else None,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_swaps_are_bounded_by_step_and_by_request(seed: int) -> None:
    _, told = drive(make(4), mixed(60, seed))
    swaps = [[event.request_id for event in step if isinstance(event, Preempted)] for step in told]
    assert 0 < sum(map(len, swaps)) and max(map(len, swaps)) <= 4
    assert max(Counter(itertools.chain.from_iterable(swaps)).values()) <= 8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule_steps", [7, 50])
def test_standing_plans_change_nothing(seed: int, schedule_steps: int) -> None:
    runs = [drive(make(4, schedule_steps, repeat), mixed(60, seed)) for repeat in (True, False)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("admit", ["whole-prompt", "past-future"])
def test_the_twins_leaps_change_nothing(admit: str) -> None:
    load = Load(mixed(150, 5), {f"r{i}": 3 + 7 * i % 60 for i in range(150)})
    ends = []
    for repeat in (True, False):
        settings = settings_of("jitserve", admit=admit)
        served = serve(load, settings, limits(2000, running_max=6, repeat=repeat))
        ends.append({name: (each.finish_s, each.output_tokens) for name, each in served.outcomes.items()})
        assert served.preemptions > 0
    assert ends[0] == ends[1]


def test_chats_do_not_wait_for_a_batch_under_the_default_preset() -> None:
    """Two hundred long requests at once beside chats that were promised nothing; 32 places."""
    chats = [Request(f"c{index}", 600, 120, 0.125 * index) for index in range(200)]
    door = "[desk]\nqueue_requests_max = 65536\nqueue_wait_s_max = 1e6\nqueue_tokens_max = 1000000000"

    def p99_s(priority: int) -> float:
        batch = [Request(f"b{i}", 1500, 300, 0.5, slo_class="batch", priority=priority) for i in range(200)]
        load = Load(sorted([*chats, *batch], key=lambda each: each.arrival_s))
        served = serve(load, settings_of("penstock", door), limits(60_000, running_max=32))
        return float(np.quantile(served.values("ttft_s", [each.id for each in chats]), 0.99))

    assert p99_s(1_000_000) <= 0.3 * p99_s(0)
