"""Two lanes on the real engine: the same tokens as one step at a time, whatever overlaps, fails or hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_schedule_invariance import KV_BLOCKS, REQUESTS, Case

from penstock.core.events import Finished, Preempted, TokenOut
from penstock.core.reasons import CancelReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import StepResult
from penstock.engine.executor import StepWork, TorchExecutor
from penstock.engine.kernels import load_kernels
from penstock.engine.lanes import EngineLanes
from penstock.policies.lanes import Lane
from penstock.policies.stack import make_stack
from penstock.replica.laned import LanedReplica
from penstock.replica.limits import ReplicaLimits

WAIT_S = 30.0


@pytest.fixture(scope="module", params=["torch", "paged-cpu"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "paged-cpu" and load_kernels() is None:
        pytest.skip("the compiled kernels are not built here")
    return Case(tmp_path_factory.mktemp("tiny"), torch.bfloat16, request.param)


def make_replica(**sizes: int) -> LanedReplica:
    wanted = {"kv_blocks": KV_BLOCKS, "running_max": 8, "step_tokens_max": 64, "context_len_max": 512} | sizes
    limits = ReplicaLimits(kv_block_tokens=16, repeat=False, **wanted)
    policies = PolicySettings(lanes="static", options={"static": {"prefill_frac": 0.5, "decode_frac": 1.0}})
    return LanedReplica(limits, make_stack(policies))


class Run:
    """The loop of `LanedLoop`, with the turn as its clock."""

    def __init__(self, executor: TorchExecutor, replica: LanedReplica) -> None:
        self.lanes = EngineLanes(executor)
        self.replica = replica
        self.turn = 0
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, Finished] = {}
        self.preemptions = 0
        self.overlaps = 0

    def close(self) -> None:
        self.lanes.close()

    def submit(self, request: Request) -> None:
        self.outputs[request.id] = []
        self.replica.submit(request, float(self.turn))

    def begin(self) -> None:
        for lane in self.replica.plan_order:
            if lane not in self.replica.in_progress:
                step = self.replica.plan_lane(lane, float(self.turn))
                if step is not None:
                    self.lanes.begin(step)
        self.overlaps += len(self.replica.in_progress) == 2

    def take(self) -> None:
        """Account what has ended, once something has."""
        self.turn += 1
        self.lanes.wait(None, WAIT_S)
        for ended in self.lanes.take():
            assert isinstance(ended.outcome, StepResult), ended.outcome
            for event in self.replica.complete_lane(ended.step, ended.outcome, float(self.turn)):
                self.preemptions += isinstance(event, Preempted)
                if isinstance(event, TokenOut):
                    self.outputs[event.request_id].append(event.token_id)
                elif isinstance(event, Finished):
                    self.ended[event.request_id] = event
        self.replica.check_invariants()

    def serve(self, requests: list[Request], submit_at: list[int]) -> None:
        coming = list(zip(submit_at, requests, strict=True))
        while coming or self.replica.has_work:
            while coming and (coming[0][0] <= self.turn or not self.replica.has_work):
                self.submit(coming.pop(0)[1])
            self.begin()
            self.take()


@given(data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lanes_give_the_same_tokens_as_each_request_alone(case: Case, data: st.DataObject) -> None:
    order = list(data.draw(st.permutations(REQUESTS)))
    submit_at = sorted(data.draw(st.integers(0, 30)) for _ in order)
    sizes = {
        "kv_blocks": data.draw(st.integers(11, KV_BLOCKS)),
        "running_max": data.draw(st.integers(1, 8)),
        "step_tokens_max": data.draw(st.sampled_from([3, 16, 64, 256])),
    }
    with closing(Run(case.engine.executor(KV_BLOCKS), make_replica(**sizes))) as run:
        run.serve(order, submit_at)
        assert run.outputs == case.alone


def test_steps_of_both_lanes_overlap_and_memory_runs_out(case: Case) -> None:
    """Else the comparison above would show nothing."""
    with closing(Run(case.engine.executor(KV_BLOCKS), make_replica(kv_blocks=11))) as run:
        run.serve(list(REQUESTS), [0] * len(REQUESTS))
        assert run.overlaps > 0 and run.preemptions > 0
        assert run.outputs == case.alone


class Gated(TorchExecutor):
    """Holds the steps of one lane until it is let go."""

    gate: threading.Event
    lane_name = Lane.PREFILL.value

    def compute(self, work: StepWork) -> StepResult:
        if threading.current_thread().name.startswith(self.lane_name):
            assert self.gate.wait(WAIT_S)
        return super().compute(work)


@pytest.fixture
def gated(case: Case) -> Iterator[Run]:
    executor = case.engine.executor(KV_BLOCKS)
    executor.__class__ = Gated
    assert isinstance(executor, Gated)
    executor.gate = threading.Event()
    executor.gate.set()
    with closing(Run(executor, make_replica())) as run:
        yield run
        executor.gate.set()


def gate_of(run: Run) -> threading.Event:
    executor = run.lanes._executor
    assert isinstance(executor, Gated)
    return executor.gate


def test_decodes_go_on_beside_a_prompt_that_takes_its_time(gated: Run, case: Case) -> None:
    first, second = REQUESTS[4], REQUESTS[6]
    gated.submit(first)
    while len(gated.outputs[first.id]) < 1:
        gated.begin()
        gated.take()
    gate_of(gated).clear()
    gated.submit(second)
    while first.id not in gated.ended:
        gated.begin()
        gated.take()
    assert not gated.outputs[second.id], "its prompt is still being computed"
    assert gated.outputs[first.id] == case.alone[first.id]
    gate_of(gated).set()
    while second.id not in gated.ended:
        gated.begin()
        gated.take()
    assert gated.outputs[second.id] == case.alone[second.id]


def test_who_leaves_while_its_prompt_is_computed_gets_no_token_and_its_blocks_come_back(gated: Run) -> None:
    gone, other = REQUESTS[6], REQUESTS[4]
    gate_of(gated).clear()
    gated.submit(gone)
    gated.begin()
    finished = gated.replica.cancel(gone.id, CancelReason.CLIENT_DISCONNECT, float(gated.turn))
    assert finished is not None
    assert gated.replica.stats().kv_blocks_free < KV_BLOCKS, "the step still writes into its blocks"
    gated.begin()  # tells the executor that it has ended, or nothing yet
    gate_of(gated).set()
    gated.take()
    assert not gated.outputs[gone.id]
    gated.serve([other], [0])
    assert other.id in gated.ended and not gated.outputs[gone.id]


@pytest.mark.parametrize(
    ("cores", "share", "threads"), [(1, 0.5, 1), (2, 0.5, 1), (2, 1.0, 2), (8, 0.1, 1), (8, 0.6, 5)]
)
def test_a_share_of_the_device_is_a_share_of_the_cores(
    case: Case, cores: int, share: float, threads: int
) -> None:
    executor = case.engine.executor(KV_BLOCKS)
    executor._threads = type(executor.threads)(cores, are_shared=True)
    with closing(EngineLanes(executor)) as lanes:
        assert lanes.threads_of(share) == threads
