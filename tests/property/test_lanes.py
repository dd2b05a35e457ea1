"""Two lanes over one pool: steps of both overlap in any way, and nobody touches a block that is another's."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from fake_executor import expected_output, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished, ReplicaEvent, TokenOut
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings, Settings
from penstock.core.step import SequenceStart, StepPlan, StepResult
from penstock.policies.lanes import Lane
from penstock.policies.stack import make_stack
from penstock.replica.laned import LanedReplica, LaneStep
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs.hardware import load_engine, load_hardware
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.laned import make_twin
from penstock.twin.replica import PathCosts

BLOCK = 4


@dataclass
class _Live:
    start: SequenceStart
    tokens: list[int]
    blocks: list[int]


@dataclass
class TwoPhaseExecutor:
    """Reads KV when a step begins and again when it ends, and writes when it ends: as late as it may.

    So a block that is given away while a step still touches it shows, in the step or in its next owner.
    """

    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    live: dict[int, _Live] = field(default_factory=dict)
    decoding: dict[int, None] = field(default_factory=dict)
    tasks: dict[Lane, list[tuple[int, _Live, int, int, bool]]] = field(default_factory=dict)

    def begin(self, step: LaneStep) -> None:
        plan = step.plan
        self._take_in(plan)
        if plan.chunks:
            chunks = [(c.seq_id, self.live[c.seq_id], c.start, c.count, c.emits) for c in plan.chunks]
            self.tasks[step.lane] = chunks
        else:
            ids = [seq_id for seq_id in self.decoding if seq_id not in plan.paused]
            assert len(ids) == plan.decode_count
            rows = [(i, self.live[i], len(self.live[i].tokens) - 1, 1, True) for i in ids]
            self.tasks[step.lane] = rows
        self._check(step.lane)

    def end(self, lane: Lane) -> StepResult:
        self._check(lane)
        tokens: dict[int, int] = {}
        for seq_id, live, start, count, emits in self.tasks.pop(lane):
            for position in range(start, start + count):
                self.kv[self._slot(live.blocks, position)] = live.tokens[position]
            if emits and self.live.get(seq_id) is live:
                live.tokens.append(next_token(live.tokens))
                tokens[seq_id] = live.tokens[-1]
                self.decoding[seq_id] = None
        return StepResult(tokens)

    def _take_in(self, plan: StepPlan) -> None:
        for seq_id in plan.ends:
            del self.live[seq_id]
            self.decoding.pop(seq_id, None)
        for start in plan.starts:
            assert start.tokens is not None
            self.live[start.seq_id] = _Live(start, list(start.tokens), list(start.blocks))
        for seq_id, blocks in plan.new_blocks:
            self.live[seq_id].blocks.extend(blocks)

    def _check(self, lane: Lane) -> None:
        for _, live, start, _, _ in self.tasks[lane]:
            for position in range(start):
                held = self.kv[self._slot(live.blocks, position)]
                assert held == live.tokens[position], "KV of the history is intact"

    def _slot(self, blocks: list[int], position: int) -> tuple[int, int]:
        return blocks[position // BLOCK], position % BLOCK


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    requests = []
    for index in range(draw(st.integers(1, 7))):
        stem = [draw(st.integers(0, 1))] * draw(st.integers(0, 14))
        prompt = [*stem, *draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))]
        stops = frozenset(draw(st.sets(st.integers(0, 999), max_size=40)))
        outputs = draw(st.integers(1, 12))
        requests.append(
            Request(f"r{index}", len(prompt), outputs, 0.0, prompt_tokens=prompt, stop_token_ids=stops)
        )
    return requests


systems = st.fixed_dictionaries(
    {
        "kv_blocks": st.integers(9, 20),
        "running_max": st.integers(1, 5),
        "step_tokens_max": st.integers(1, 24),
        "prefix_cache": st.booleans(),
    }
)
stacks = st.sampled_from(
    [
        {"lanes": "static"},
        {"lanes": "static", "compose": "prefill-first"},
        {"lanes": "semi-pd"},
        {"lanes": "semi-pd"},
        {"lanes": "nexus", "rank": "shortest-prompt-aged"},
    ]
)


def make(stack: dict[str, str], system: dict[str, int]) -> LanedReplica:
    sizes = ReplicaLimits(kv_block_tokens=BLOCK, context_len_max=512, **system)  # type: ignore[arg-type]
    return LanedReplica(sizes, make_stack(PolicySettings(**stack)))


@given(loads(), systems, stacks, st.data())
@settings(max_examples=150, deadline=None)
def test_any_overlap_gives_the_right_output(
    load: list[Request], system: dict[str, int], stack: dict[str, str], data: st.DataObject
) -> None:
    """Lanes end in any order, requests come and clients leave between any two happenings."""
    draw = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    replica, executor = make(stack, system), TwoPhaseExecutor()
    events: list[ReplicaEvent] = []
    waiting, now_s, cancels = list(load), 0.0, draw.random() < 0.5
    for _ in range(4_000):
        now_s += 0.1
        if waiting and draw.random() < 0.4:
            replica.submit(waiting.pop(0), now_s)
        if cancels and draw.random() < 0.05:
            finished = replica.cancel(f"r{draw.integers(len(load))}", CancelReason.ADMIN, now_s)
            events += [finished] if finished else []
        for lane in replica.plan_order:
            if lane not in replica.in_progress:
                step = replica.plan_lane(lane, now_s)
                if step is not None:
                    assert step.plan.token_count <= max(system["step_tokens_max"], 64)
                    executor.begin(step)
                replica.check_invariants()
        if replica.in_progress:
            busy = list(replica.in_progress)
            lane = busy[int(draw.integers(len(busy)))]
            result = executor.end(lane)
            events += replica.complete_lane(replica.in_progress[lane], result, now_s)
        elif replica.has_work:
            raise AssertionError("both lanes idle while there is work")
        replica.check_invariants()
        if not waiting and not replica.has_work and not replica.in_progress:
            break
    else:
        raise AssertionError("the load never finished")
    assert replica.stats().kv_blocks_used == 0
    _check_outputs(load, events)


def _check_outputs(load: list[Request], events: list[ReplicaEvent]) -> None:
    ends = {event.request_id: event for event in events if isinstance(event, Finished)}
    assert len([event for event in events if isinstance(event, Finished)]) == len(ends), "each ends once"
    assert ends.keys() == {request.id for request in load}
    for request in load:
        told = [e.token_id for e in events if isinstance(e, TokenOut) and e.request_id == request.id]
        expected, end = expected_output(request), ends[request.id]
        if end.reason is FinishReason.CANCELLED:
            assert told == expected[: len(told)]
        else:
            assert told == expected
            assert end.output_tokens == len(told) + (end.stop_token_id is not None)


@pytest.mark.pure
def test_without_holding_blocks_back_it_shows() -> None:
    """The test above has teeth: blocks of who is cancelled within a step must not be given away at once."""
    system = {"kv_blocks": 4, "running_max": 4, "step_tokens_max": 16, "prefix_cache": False}
    replica, executor = make({"lanes": "static"}, system), TwoPhaseExecutor()
    replica._computing = lambda sequence: None  # type: ignore[method-assign]
    replica.submit(Request("a", 7, 8, 0.0, prompt_tokens=[1] * 7), 0.0)
    executor.begin(_step(replica, Lane.PREFILL))
    replica.complete_lane(replica.in_progress[Lane.PREFILL], executor.end(Lane.PREFILL), 9.0)
    executor.begin(_step(replica, Lane.DECODE))
    replica.cancel("a", CancelReason.ADMIN, 9.0)
    replica.submit(Request("b", 14, 2, 0.0, prompt_tokens=[2] * 14), 9.0)
    executor.begin(_step(replica, Lane.PREFILL))
    replica.complete_lane(replica.in_progress[Lane.PREFILL], executor.end(Lane.PREFILL), 9.0)
    with pytest.raises(AssertionError, match="intact"):
        executor.end(Lane.DECODE)


def _step(replica: LanedReplica, lane: Lane) -> LaneStep:
    step = replica.plan_lane(lane, 9.0)
    assert step is not None
    return step


# ---- the twin ---------------------------------------------------------------------------------------------


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[Request, int]]:
    now_s, found = 0.0, []
    for index in range(draw(st.integers(1, 12))):
        now_s += draw(st.sampled_from([0.0, 0.001, 0.02, 0.2]))
        prompt, output = draw(st.integers(1, 900)), draw(st.integers(1, 120))
        found.append((Request(f"r{index}", prompt, output, now_s), draw(st.integers(1, 200))))
    return found


def outcomes_of(
    load: list[tuple[Request, int]], stack: dict[str, str], system: dict[str, int], repeat: bool
) -> list[tuple[object, ...]]:
    from benchmarks.effects.serving import LLAMA_3_8B

    from penstock.twin.costs.spec import ModelSpec

    cost = RooflineCostModel(ModelSpec.of(LLAMA_3_8B), load_hardware("l40s"), load_engine("vllm-2025"))
    found: list[RequestOutcome] = []
    sizes = ReplicaLimits(
        system["kv_blocks"], 16, system["running_max"], system["step_tokens"], 4096, True, repeat
    )
    options = {"semi-pd": {"window_steps": 7, "ttft_ms": 60.0, "tpot_ms": 15.0, "switch_s": 0.1}}
    twin = make_twin(
        Settings(policies=PolicySettings(**stack, options=options)), sizes, cost, PathCosts(), found.append
    )
    twin.output_lens.update({request.id: length for request, length in load})
    for request, _ in load:
        twin.arrive(request)
    twin.finish()
    twin.replica.check_invariants()
    return [(o.request_id, o.finish, o.finish_s, o.first_token_s, tuple(o.itl_s)) for o in found]


twins = st.fixed_dictionaries(
    {"kv_blocks": st.integers(66, 120), "running_max": st.integers(1, 8), "step_tokens": st.integers(16, 600)}
)


@given(arrivals(), stacks, twins)
@settings(max_examples=60, deadline=None)
def test_leaps_change_nothing(
    load: list[tuple[Request, int]], stack: dict[str, str], system: dict[str, int]
) -> None:
    leaping = outcomes_of(load, stack, system, repeat=True)
    assert leaping == outcomes_of(load, stack, system, repeat=False)
    assert len(leaping) == len(load)
