"""What every executor promises about copies of KV, on the engine and in the twin alike (`core/step.py`)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from fake_executor import FakeExecutor
from tiny_model import TinyEngine, write_tiny_llama

from penstock.core.request import SamplingParams
from penstock.core.step import Chunk, Copy, Direction, SequenceStart, StepPlan
from penstock.replica.executor import Executor
from penstock.twin.executor import ModelledExecutor
from penstock.twin.host_link import HostLink
from penstock.twin.vopr.faults import FaultyCost
from penstock.twin.vopr.script import System

BLOCK_S = 0.05  # a block's copy takes about so long, and a step far less


def modelled() -> ModelledExecutor:
    cost = FaultyCost(System(exact=False, step_base_s=0.004, step_token_s=0.0))
    return ModelledExecutor(cost, {}, HostLink(1, 1, 0.0, 1 / BLOCK_S))


@pytest.fixture(params=["torch", "modelled", "fake"])
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> Executor:
    if request.param == "modelled":
        return modelled()
    if request.param == "fake":
        return FakeExecutor(16, copy_steps=3)
    engine = TinyEngine(write_tiny_llama(tmp_path / "tiny"), torch.float32, "torch")
    made = engine.executor(16, host_blocks=16)
    block_bytes = made.store.byte_count // 16
    return engine.executor(16, host_blocks=16, bytes_per_s=block_bytes / BLOCK_S)


def start(length: int) -> SequenceStart:
    blocks = tuple(range(5, 12))
    return SequenceStart(1, "r1", [5] * length, length, length, 0, blocks, SamplingParams(temperature=0.0))


def first_step(length: int = 4) -> StepPlan:
    return StepPlan(0, [Chunk(1, 0, length, True)], 0, starts=[start(length)])


def out(copy_id: int, blocks: int = 2) -> Copy:
    return Copy(copy_id, 0, Direction.OUT, ((0, 4, blocks),))


def done_ids(result: object) -> list[int]:
    return [done.copy_id for done in result.copied]  # type: ignore[attr-defined]


def test_a_plan_without_copies_tells_of_none(executor: Executor) -> None:
    result = executor.execute(first_step())
    assert list(result.copied) == [] and result.stalled_s == 0.0


def test_a_copy_that_is_waited_for_is_done_when_the_step_is(executor: Executor) -> None:
    plan = first_step()
    plan.copies, plan.waits = [out(0)], [0]
    result = executor.execute(plan)
    assert done_ids(result) == [0] and result.steps == 1
    assert all(done.ok and done.seconds > 0.0 for done in result.copied)
    assert result.tokens is None or 1 in result.tokens, "and the step computed"


def test_a_copy_beside_the_steps_is_told_once_when_it_is_done(executor: Executor) -> None:
    plan = first_step()
    plan.copies = [out(0)]
    told = done_ids(executor.execute(plan))
    assert told == [], "a step is far shorter"
    for index in range(1, 80):
        told += done_ids(executor.execute(StepPlan(index, [], 1)))
        time.sleep(0.01)
    assert told == [0]


def test_copies_are_done_in_the_order_of_plans(executor: Executor) -> None:
    plan = first_step()
    plan.copies = [out(0), out(1)]
    executor.execute(plan)
    last = Copy(2, 0, Direction.IN, ((12, 4, 1),))
    result = executor.execute(StepPlan(1, [], 1, copies=[last], waits=[2]))
    assert done_ids(result) == [0, 1, 2], "waiting for the last is waiting for all before it"


def test_a_plan_may_only_wait(executor: Executor) -> None:
    plan = StepPlan(0, [], 0, copies=[out(0), out(1)], waits=[0])
    result = executor.execute(plan)
    assert done_ids(result) == [0] and not result.tokens and result.duration_s == 0.0
    later = executor.execute(StepPlan(1, [], 0, waits=[1]))
    assert done_ids(later) == [1]


def test_waiting_is_a_stall_and_no_part_of_the_step(executor: Executor) -> None:
    if isinstance(executor, FakeExecutor):
        pytest.skip("it has no clock")
    plan = first_step()
    plan.copies, plan.waits = [out(0, 4)], [0]
    result = executor.execute(plan)
    assert result.stalled_s >= 4 * BLOCK_S * 0.99
    assert result.copied[0].seconds == pytest.approx(4 * BLOCK_S, rel=0.5)


def test_a_leap_ends_with_the_first_step_that_ends_behind_a_copy() -> None:
    """Modelled only: the engine makes one step at a time. Otherwise a leap would change results."""
    leaps = modelled()
    single = modelled()
    ends = []
    for executor, repeat in ((leaps, 500), (single, 1)):
        executor.execute(first_step())
        plan = StepPlan(1, [], 1, copies=[out(0)], repeat=repeat)
        steps = 0
        while True:
            result = executor.execute(plan)
            steps += result.steps
            if result.copied:
                break
            plan = StepPlan(2, [], 1, repeat=repeat)
        ends.append((steps, executor.now_s))
    assert ends[0] == ends[1] and ends[0][0] > 1
