"""Conversations whose next turn is asked when the last was answered, in the twin and on the engine."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.effects.serving import NO_PATH, Served
from penstock.core.events import Finished, TokenOut
from penstock.core.metrics import RequestOutcome
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import Settings
from penstock.core.step import StepPlan, StepResult
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaStats
from penstock.replica.replica import Replica
from penstock.twin.costs.model import CostModel
from penstock.twin.replica import TwinReplica

BLOCK_TOKENS = 16
STEPS_MAX = 100_000


@dataclass(frozen=True)
class Turn:
    """What the user adds, what the answer has, in tokens, and how long the user thinks before it."""

    user_tokens: int
    answer_tokens: int
    think_s: float = 0.0


@dataclass(frozen=True)
class Conversation:
    begins_s: float
    turns: Sequence[Turn]


def chats(count: int, rate_rps: float, seed: int = 1, think_s: float = 10.0) -> list[Conversation]:
    """About ShareGPT's shape: 5.5 turns in the mean, short questions, answers of some 200 tokens."""
    draw, now_s, found = random.Random(f"conversations/{seed}"), 0.0, []
    for _ in range(count):
        now_s += draw.expovariate(rate_rps)
        turns = 1
        while turns < 16 and draw.random() > 1 / 5.5:
            turns += 1
        found.append(Conversation(now_s, [_turn(draw, think_s) for _ in range(turns)]))
    return found


def _turn(draw: random.Random, think_s: float) -> Turn:
    user = max(4, int(draw.lognormvariate(3.6, 1.0)))
    answer = max(4, min(800, int(draw.lognormvariate(5.0, 0.9))))
    return Turn(user, answer, draw.expovariate(1 / think_s))


def serve_chats(
    conversations: Sequence[Conversation], settings: Settings, sizes: ReplicaLimits, cost: CostModel
) -> Served:
    """Every turn to its end, in the twin. Contents are known, so that a turn finds what the last one left."""
    outcomes: dict[str, RequestOutcome] = {}
    due: list[tuple[float, int, int, int]] = []  # when, conversation, turn, tokens said before

    def ended(outcome: RequestOutcome) -> None:
        outcomes[outcome.request_id] = outcome
        index, turn = map(int, outcome.request_id.split("."))
        turns = conversations[index].turns
        if turn + 1 < len(turns):
            said = outcome.prompt_tokens + outcome.output_tokens
            heapq.heappush(due, (outcome.finish_s + turns[turn + 1].think_s, index, turn + 1, said))

    twin = TwinReplica(settings, sizes, cost, NO_PATH, ended)
    for index, conversation in enumerate(conversations):
        heapq.heappush(due, (conversation.begins_s, index, 0, 0))
    turns = sum(len(conversation.turns) for conversation in conversations)
    while len(outcomes) < turns:
        if due and (twin.now_s >= due[0][0] or twin.next_s > due[0][0]):
            at_s, index, turn, said = heapq.heappop(due)
            twin.arrive(_request(conversations[index], index, turn, said, at_s))
        else:
            twin.proceed(due[0][0] if due else float("inf"))
    twin.finish()
    twin.replica.check_invariants()
    return Served(outcomes, twin.replica.stats(), twin)


def _request(conversation: Conversation, index: int, turn: int, said: int, at_s: float) -> Request:
    asked = conversation.turns[turn]
    prompt_len = said + asked.user_tokens
    blocks = (prompt_len + asked.answer_tokens) // BLOCK_TOKENS
    return Request(
        f"{index}.{turn}",
        prompt_len,
        asked.answer_tokens,
        at_s,
        block_keys=[f"{index}/{block}".encode() for block in range(blocks)],
        session_id=str(index),
        is_last_turn=turn + 1 == len(conversation.turns),
    )


class Executes(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...


@dataclass(frozen=True)
class Talked:
    """What came of conversations on an engine: every answer's tokens by request id, and the counters."""

    answers: dict[str, list[int]]
    stats: ReplicaStats
    steps: int


def talk(replica: Replica, executor: Executes, conversations: Sequence[Conversation], vocab: int) -> Talked:
    """All at once, each turn asked as soon as the last was answered; a step is a second of the clock."""
    said: list[list[int]] = [[] for _ in conversations]
    answers: dict[str, list[int]] = {}

    def ask(index: int, turn: int, now_s: float) -> None:
        draw, asked = random.Random(f"{index}/{turn}"), conversations[index].turns[turn]
        said[index] += [draw.randrange(3, vocab) for _ in range(asked.user_tokens)]
        request = Request(
            f"{index}.{turn}",
            len(said[index]),
            asked.answer_tokens,
            now_s,
            prompt_tokens=list(said[index]),
            sampling=SamplingParams(temperature=0.0),
            session_id=str(index),
            is_last_turn=turn + 1 == len(conversations[index].turns),
        )
        answers[request.id] = []
        replica.submit(request, now_s)

    for index in range(len(conversations)):
        ask(index, 0, 0.0)
    for step in range(STEPS_MAX):
        plan = replica.plan(float(step))
        if plan is None:
            return Talked(answers, replica.stats(), step)
        for event in replica.complete(plan, executor.execute(plan), step + 0.5):
            if isinstance(event, TokenOut):
                answers[event.request_id].append(event.token_id)
            elif isinstance(event, Finished):
                index, turn = map(int, event.request_id.split("."))
                said[index] += answers[event.request_id]
                if turn + 1 < len(conversations[index].turns):
                    ask(index, turn + 1, step + 0.5)
    raise AssertionError("the conversations never end")
