"""Agents through a real engine in this process: tools that take time, answers that the next turn holds."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.core.events import Admitted, Finished, Preempted, TokenOut
from penstock.core.request import Request, SamplingParams
from penstock.core.step import StepPlan, StepResult
from penstock.replica.messages import ReplicaStats
from penstock.replica.replica import Replica

IDLE_S = 0.001


class Executes(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...


@dataclass
class Agent:
    """A run: a first prompt, what the tool gives back after each turn, and how long it takes."""

    name: str
    prompt: list[int]
    results: Sequence[Sequence[int]]
    output_tokens: int
    tool_s: float
    turn: int = 0
    known: int = 0  # tokens that had KV when its last turn ended

    @property
    def is_on_last_turn(self) -> bool:
        return self.turn == len(self.results)

    def request(self, arrival_s: float) -> Request:
        return Request(
            f"{self.name}/{self.turn}",
            len(self.prompt),
            self.output_tokens,
            arrival_s,
            prompt_tokens=self.prompt,
            sampling=SamplingParams(temperature=0.0),
            program_id=self.name,
            tool="sleep",
            is_last_turn=self.is_on_last_turn,
        )

    def take(self, answer: Sequence[int]) -> bool:
        """Its turn is over; whether another follows."""
        self.known = len(self.prompt) + len(answer) - 1
        if self.is_on_last_turn:
            return False
        self.prompt = [*self.prompt, *answer, *self.results[self.turn]]
        self.turn += 1
        return True


def make_agents(
    count: int, turns: int, prompt: int, result: int, output: int, tool_s: float, ids: tuple[int, int]
) -> list[Agent]:
    """Contents of their own, drawn from `ids`; the same each time."""

    def tokens(name: str, length: int) -> list[int]:
        draw = random.Random(name)
        return [draw.randrange(*ids) for _ in range(length)]

    return [
        Agent(
            f"a{number}",
            tokens(f"{number}/prompt", prompt),
            [tokens(f"{number}/{turn}", result) for turn in range(turns - 1)],
            output,
            tool_s,
        )
        for number in range(count)
    ]


class VirtualTime:
    """A step takes `step_s`, and nobody waits in vain: for tests."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def stepped(self, result: StepResult) -> None:
        result.duration_s = self._step_s  # policies learn from it
        self._now_s += self._step_s

    def wait(self, until_s: float) -> None:
        self._now_s = max(self._now_s, until_s)


class RealTime:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def stepped(self, result: StepResult) -> None:
        pass

    def wait(self, until_s: float) -> None:
        time.sleep(max(0.0, min(until_s - self.now_s(), IDLE_S)))


@dataclass
class AgentsRun:
    """`outputs` by request id; `hits` of the `returns` found every full block that was there; job times.

    `last_turns_preempted` counts each time.
    """

    outputs: dict[str, list[int]] = field(default_factory=dict)
    hits: int = 0
    returns: int = 0
    last_turns_preempted: int = 0
    job_s: dict[str, float] = field(default_factory=dict)
    stats: ReplicaStats = field(default_factory=ReplicaStats)

    @property
    def hit_frac(self) -> float:
        return self.hits / max(1, self.returns)

    @property
    def mean_job_s(self) -> float:
        return sum(self.job_s.values()) / len(self.job_s)


def run_agents(
    executor: Executes,
    replica: Replica,
    agents: Sequence[Agent],
    clock: VirtualTime | RealTime,
    each_step: Callable[[], None] = lambda: None,
) -> AgentsRun:
    """All of them to their ends, starting together."""
    run = AgentsRun()
    by_name = {agent.name: agent for agent in agents}
    due = [(0.0, agent.name) for agent in agents]
    heapq.heapify(due)
    while due or replica.has_work:
        while due and due[0][0] <= clock.now_s():
            due_s, name = heapq.heappop(due)
            replica.submit(by_name[name].request(due_s), clock.now_s())
        plan = replica.plan(clock.now_s())
        if plan is None:
            clock.wait(due[0][0])
            continue
        result = executor.execute(plan)
        clock.stepped(result)
        for event in replica.complete(plan, result, clock.now_s()):
            name = event.request_id.split("/")[0]
            if isinstance(event, Admitted) and not event.resumed:
                known = by_name[name].known
                run.returns += known > 0
                run.hits += (
                    known > 0 and event.cached_len >= known // replica.block_tokens * replica.block_tokens
                )
            elif isinstance(event, Preempted):
                run.last_turns_preempted += by_name[name].is_on_last_turn
            elif isinstance(event, TokenOut):
                run.outputs.setdefault(event.request_id, []).append(event.token_id)
            elif isinstance(event, Finished):
                run.job_s[name] = event.at_s
                if by_name[name].take(run.outputs[event.request_id]):
                    heapq.heappush(due, (event.at_s + by_name[name].tool_s, name))
        each_step()
    run.stats = replica.stats()
    return run
