"""Random programs under Continuum: no output changes, pins keep their promise, leaps change nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cost_models import ideal, model_on
from fake_executor import FakeExecutor, expected_output
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished, ReplicaEvent, TokenOut
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.settings import PolicySettings, Settings
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.pins import ENDED_MAX
from penstock.replica.replica import Replica
from penstock.twin.simulate import Clients, simulate
from penstock.workloads.programs import TOOLS, ProgramShape, program_rows

STEPS_MAX = 3_000


@dataclass(frozen=True)
class Turn:
    program: int | None
    new_tokens: int
    output_tokens: int
    gap_steps: int
    tool: str | None
    pin_s: float | None
    is_last: bool
    cancel_after: int | None


turns = st.builds(
    Turn,
    program=st.sampled_from([None, 0, 0, 1, 1, 2, 3]),
    new_tokens=st.integers(1, 9),
    output_tokens=st.integers(1, 9),
    gap_steps=st.integers(0, 8),
    tool=st.sampled_from([None, "ls", "cc"]),
    pin_s=st.sampled_from([None, None, 0.0, 3.0, 50.0]),
    is_last=st.sampled_from([False, False, False, True]),
    cancel_after=st.sampled_from([None, None, None, 3]),
)
stacks = st.fixed_dictionaries(
    {
        "rank": st.sampled_from(["program-fcfs", "program-fcfs", "fcfs"]),
        "preempt": st.sampled_from(["program", "youngest-recompute"]),
        "compose": st.sampled_from(["sarathi", "prefill-first"]),
        "rule": st.sampled_from(["cdf", "mean", "forever"]),
        "kv_blocks": st.integers(10, 30),
        "running_max": st.integers(1, 4),
    }
)


def make_replica(stack: dict[str, object], repeat: bool) -> Replica:
    policies = PolicySettings(
        rank=str(stack["rank"]),
        preempt=str(stack["preempt"]),
        compose=str(stack["compose"]),
        retain="continuum",
        options={"continuum": {"rule": stack["rule"]}},
    )
    limits = ReplicaLimits(
        int(str(stack["kv_blocks"])), 4, int(str(stack["running_max"])), 24, 36, True, repeat
    )
    return Replica(limits, make_stack(policies))


class Drive:
    """Turns arrive by their gaps, each program's content growing as long as it fits the context."""

    def __init__(self, script: list[Turn], stack: dict[str, object], repeat: bool) -> None:
        self.replica = make_replica(stack, repeat)
        self.executor = FakeExecutor(4)
        self.events: list[ReplicaEvent] = []
        self.requests: dict[str, Request] = {}
        self._content: dict[int, list[int]] = {}
        step = due = 0
        cancels: dict[int, str] = {}
        for number, turn in enumerate(script):
            due += turn.gap_steps
            while step < due:
                self.step(step)
                step = self._cancel(cancels, step + 1)
            request = self.request(number, turn)
            self.replica.submit(request, float(step))
            if turn.cancel_after is not None:
                cancels[step + turn.cancel_after] = request.id
        while self.replica.has_work:
            self.step(step)
            step = self._cancel(cancels, step + 1)
            assert step < STEPS_MAX, "somebody waits for ever"

    def _cancel(self, cancels: dict[int, str], step: int) -> int:
        if step in cancels:
            end = self.replica.cancel(cancels[step], CancelReason.ADMIN, float(step))
            self.events += [end] if end else []
        return step

    def request(self, number: int, turn: Turn) -> Request:
        key = -1 - number if turn.program is None else turn.program
        tokens = [*self._content.get(key, []), *((key * 7 + i) % 50 for i in range(turn.new_tokens))][:26]
        request = Request(
            f"r{number}",
            len(tokens),
            turn.output_tokens,
            0.0,
            prompt_tokens=tokens,
            program_id=None if turn.program is None else f"p{turn.program}",
            tool=turn.tool,
            pin_s=turn.pin_s,
            is_last_turn=turn.is_last,
        )
        self._content[key] = [*tokens, *expected_output(request)]
        self.requests[request.id] = request
        return request

    def step(self, step: int) -> None:
        plan = self.replica.plan(float(step))
        if plan is not None:
            self.events += self.replica.complete(plan, self.executor.execute(plan), step + 0.5)
        self.replica.check_invariants()


@given(st.lists(turns, min_size=1, max_size=14), stacks)
@settings(max_examples=150, deadline=None)
def test_every_turn_gets_its_answer(script: list[Turn], stack: dict[str, object]) -> None:
    drive = Drive(script, stack, repeat=True)
    ends = {event.request_id: event for event in drive.events if isinstance(event, Finished)}
    assert ends.keys() == drive.requests.keys()
    for name, request in drive.requests.items():
        told = [e.token_id for e in drive.events if isinstance(e, TokenOut) and e.request_id == name]
        expected = expected_output(request)
        assert told == (expected[: len(told)] if ends[name].reason is FinishReason.CANCELLED else expected)
    counts = drive.replica.stats().pins_total
    assert counts["made"] == drive.replica.stats().pins + sum(
        counts[why] for why in ("replaced", "expired", "sacrificed", "released")
    )


@given(st.lists(turns, min_size=1, max_size=14), stacks)
@settings(max_examples=100, deadline=None)
def test_standing_plans_change_nothing(script: list[Turn], stack: dict[str, object]) -> None:
    assert Drive(script, stack, True).events == Drive(script, stack, False).events


def test_pins_that_are_replaced_are_forgotten() -> None:
    """A program comes back at once, again and again, while another's pin is the next to expire."""
    stack = {"rank": "fcfs", "preempt": "program", "compose": "sarathi", "rule": "mean"}
    drive = Drive([], stack | {"kv_blocks": 30, "running_max": 2}, repeat=True)
    for number in range(200):
        turn = Turn(min(number, 1), 5, 2, 0, "ls", 50.0, False, None)
        drive.replica.submit(drive.request(number, turn), 0.0)
        while drive.replica.has_work:
            drive.step(0)
    stats = drive.replica.stats()
    assert stats.pins == 2 and stats.pins_total["replaced"] > 150
    assert len(drive.replica._pins._expiries) <= 2 * stats.pins + ENDED_MAX


def simulated(
    shape: ProgramShape, seed: int, policies: PolicySettings, repeat: bool
) -> tuple[list[object], dict[str, int]]:
    outcomes: list[RequestOutcome] = []
    limits = ReplicaLimits(90, 4, 6, 48, 4096, repeat=repeat)
    cost = model_on(ideal(2e13, 1e12))
    rows = program_rows(shape, seed)
    fleet = simulate(
        rows, Settings(policies=policies), limits, cost, outcomes.append, clients=Clients(closed_loop=True)
    )
    fleet[0].replica.check_invariants()
    ends = [
        (outcome.request_id, outcome.first_token_s, outcome.finish_s, outcome.cached_tokens, *outcome.itl_s)
        for outcome in outcomes
    ]
    return ends, fleet[0].replica.stats().pins_total


@given(
    seed=st.integers(0, 1 << 20),
    rule=st.sampled_from(["cdf", "mean", "forever"]),
    slow_frac=st.sampled_from([0.0, 0.2]),
    tool_scale=st.sampled_from([0.1, 1.0]),
)
@settings(max_examples=30, deadline=None)
def test_leaps_of_the_twin_change_nothing(seed: int, rule: str, slow_frac: float, tool_scale: float) -> None:
    shape = ProgramShape(
        programs=12,
        rate_per_s=4.0,
        tools=[replace(tool, mean_s=tool.mean_s * tool_scale, slow_frac=slow_frac) for tool in TOOLS],
        turns=(2, 9),
        prompt_tokens=(20, 60),
        result_tokens=(1, 20),
        output_tokens=(1, 16),
        block_tokens=4,
    )
    policies = PolicySettings(
        rank="program-fcfs", preempt="program", retain="continuum", options={"continuum": {"rule": rule}}
    )
    assert simulated(shape, seed, policies, True) == simulated(shape, seed, policies, False)
