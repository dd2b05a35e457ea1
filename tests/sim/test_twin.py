"""The twin: leaps change nothing, tokens add up, the executor knows what the replica knows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from cost_models import PlainCost
from fake_executor import FakeExecutor, expected_output, make_replica
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.core.settings import DeskSettings, PolicySettings, Settings
from penstock.core.step import StepPlan
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs.work import StepCost, StepWork
from penstock.twin.executor import ModelledExecutor
from penstock.twin.replica import PathCosts, TwinReplica
from penstock.twin.simulate import simulate
from penstock.workloads.trace import TraceRow

LIMITS = ReplicaLimits(
    kv_blocks=40, kv_block_tokens=4, running_max=6, step_tokens_max=16, context_len_max=150, repeat=True
)

rows = st.lists(
    st.builds(
        TraceRow,
        arrival_s=st.floats(0.0, 0.5),
        prompt_tokens=st.integers(1, 60),
        output_tokens=st.integers(1, 60),
        block_hashes=st.one_of(st.none(), st.tuples(st.integers(0, 2), st.integers(3, 5), st.integers(6, 9))),
        block_tokens=st.just(8),
    ),
    min_size=1,
    max_size=14,
).map(lambda items: sorted(items, key=lambda row: row.arrival_s))


def run(load: list[TraceRow], limits: ReplicaLimits, **policies: str) -> list[tuple[object, ...]]:
    outcomes: list[RequestOutcome] = []
    chosen = Settings(policies=PolicySettings(**policies), desk=DeskSettings(engine_ahead=2))
    fleet = simulate(load, chosen, limits, PlainCost(), outcomes.append)
    for twin in fleet:
        twin.replica.check_invariants()
        assert not twin.replica.has_work
    return [
        (o.request_id, o.finish, o.first_token_s, o.last_token_s, o.finish_s, o.cached_tokens, tuple(o.itl_s))
        for o in outcomes
    ]


@given(load=rows, compose=st.sampled_from(["sarathi", "prefill-first"]), kv_blocks=st.integers(30, 60))
@settings(max_examples=200, deadline=None)
def test_leaps_change_nothing(load: list[TraceRow], compose: str, kv_blocks: int) -> None:
    limits = replace(LIMITS, kv_blocks=kv_blocks)
    assert run(load, limits, compose=compose) == run(load, replace(limits, repeat=False), compose=compose)


@given(load=rows)
@settings(max_examples=100, deadline=None)
def test_every_request_ends_once_with_all_its_tokens(load: list[TraceRow]) -> None:
    outcomes: list[RequestOutcome] = []
    simulate(load, Settings(), LIMITS, PlainCost(), outcomes.append)
    assert sorted(outcome.request_id for outcome in outcomes) == sorted(f"r{i}" for i in range(len(load)))
    for outcome in outcomes:
        row = load[int(outcome.request_id[1:])]
        assert outcome.finish is FinishReason.LENGTH and outcome.output_tokens == row.output_tokens
        assert len(outcome.itl_s) == row.output_tokens - 1 == len(list(outcome.itl_s))
        assert outcome.first_token_s is not None and outcome.last_token_s is not None
        assert outcome.arrival_s < outcome.first_token_s <= outcome.last_token_s <= outcome.finish_s
        assert sum(outcome.itl_s) == pytest.approx(outcome.last_token_s - outcome.first_token_s)
        assert all(gap > 0 for gap in outcome.itl_s)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_outputs_that_end_by_themselves(data: st.DataObject) -> None:
    """The trace's outputs are shorter than `max_tokens`; only the executor knows."""
    twin_ends: list[RequestOutcome] = []
    twin = TwinReplica(Settings(), LIMITS, PlainCost(), PathCosts(), twin_ends.append)
    lens = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
    for index, (prompt_len, output_len) in enumerate(lens):
        twin.output_lens[f"r{index}"] = output_len
        twin.arrive(Request(f"r{index}", prompt_len, 60, 0.01 * index))
    twin.finish()
    found = {o.request_id: (o.output_tokens, o.finish) for o in twin_ends}
    assert found == {f"r{i}": (length, FinishReason.STOP) for i, (_, length) in enumerate(lens)}


def plan_facts(plan: StepPlan) -> tuple[object, ...]:
    chunks = tuple((c.seq_id, c.start, c.count, c.emits) for c in plan.chunks)
    starts = tuple((s.seq_id, s.total_len, s.cached_len, s.blocks) for s in plan.starts)
    blocks = tuple((seq_id, tuple(new)) for seq_id, new in plan.new_blocks)
    return (plan.index, chunks, plan.decode_count, starts, tuple(plan.ends), blocks)


@given(load=rows, compose=st.sampled_from(["sarathi", "prefill-first"]))
@settings(max_examples=60, deadline=None)
def test_the_same_calls_give_the_same_plans_on_both_executors(load: list[TraceRow], compose: str) -> None:
    """Law 6 in small: one replica with tokens, one with lengths only, and the same outputs."""
    logs = []
    for with_tokens in (True, False):
        replica = make_replica(
            kv_blocks=40, running_max=6, step_tokens_max=16, compose=compose, repeat=False, prefix_cache=False
        )
        lens: dict[str, int] = {}
        modelled = ModelledExecutor(PlainCost(), lens)
        fake = FakeExecutor(4)
        log, pending, step = [], list(enumerate(load)), 0
        while pending or replica.has_work:
            while pending and pending[0][1].arrival_s * 40 <= step:
                index, row = pending.pop(0)
                tokens = [index] * row.prompt_tokens
                asked = Request(
                    f"r{index}", row.prompt_tokens, row.output_tokens, 0.0,
                    prompt_tokens=tokens, stop_token_ids=frozenset(range(0, 1000, 17)), cache_salt=str(index),
                )  # fmt: skip
                said = expected_output(asked)
                lens[asked.id] = len(said) + (len(said) < row.output_tokens)
                replica.submit(asked if with_tokens else replace(asked, prompt_tokens=None), float(step))
            plan = replica.plan(float(step))
            if plan is not None:
                log.append(plan_facts(plan))
                result = fake.execute(plan) if with_tokens else modelled.execute(plan)
                for event in replica.complete(plan, result, step + 0.5):
                    if isinstance(event, Finished):
                        modelled.finish(event.request_id)
            step += 1
        logs.append(log)
    assert logs[0] == logs[1]


CODE = """
import zlib, random
from penstock.core.settings import Settings
from penstock.twin.simulate import simulate
from penstock.workloads.trace import TraceRow
from test_twin import LIMITS, PlainCost
draw = random.Random(5)
load = [TraceRow(i * 0.01, draw.randint(1, 60), draw.randint(1, 60)) for i in range(200)]
outcomes = []
simulate(load, Settings(), LIMITS, PlainCost(), outcomes.append, replicas=2)
print(zlib.crc32(repr([(o.request_id, o.first_token_s, list(o.itl_s)) for o in outcomes]).encode()))
"""


def test_the_same_bytes_in_every_process() -> None:
    from pathlib import Path

    folder = Path(__file__).parent
    path = f"{folder}:{folder.parent / 'helpers'}"
    digests = {
        subprocess.run(
            [sys.executable, "-c", CODE],
            env={"PYTHONPATH": ":".join([path, *sys.path]), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_steps_that_take_no_time_end_as_well() -> None:
    class Free(PlainCost):
        def seconds(self, work: StepWork) -> float:
            return 0.0

    outcomes: list[RequestOutcome] = []
    load = [TraceRow(0.0, 20, 40), TraceRow(0.0, 5, 9)]
    simulate(load, Settings(), LIMITS, Free(), outcomes.append)
    assert sorted(outcome.output_tokens for outcome in outcomes) == [9, 40]


def test_energy_is_power_times_the_time_it_was_drawn() -> None:
    class Drawing(PlainCost):
        def step(self, work: StepWork) -> StepCost:
            seconds = self.seconds(work)
            return StepCost(seconds, "compute", 250.0 * seconds, 0.0, 0.0, True)

    load = [TraceRow(0.01 * index, 30, 50) for index in range(20)]
    (twin,) = simulate(load, Settings(), LIMITS, Drawing(), lambda outcome: None)
    assert twin.executor.busy_joules == pytest.approx(250.0 * twin.executor.busy_s)
    assert 0 < twin.executor.busy_s <= twin.now_s
