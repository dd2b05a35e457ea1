"""Live equals twin, for every preset: the journal of a real engine's run leads a replica to the same plans.

The engine's own loop runs here in a thread, on a tiny model, under everything that a policy may read:
tenants, classes, priorities, programs of several turns, groups, siblings, shared and scored prompts, long
ones, stops, and cancels of the waiting and the running. A new preset is covered by being there.
"""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from engine_thread import TINY_REPLICA, WAIT_S, EngineThread
from tiny_model import Source, write_tiny_llama

from penstock.core.config import resolve
from penstock.core.events import Finished, TokenOut
from penstock.core.metrics import Slo
from penstock.core.reasons import CancelReason
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import Settings
from penstock.engine.commands import Cancel, Submit
from penstock.policies.stack import load_preset, preset_names
from penstock.replica.messages import StepReport
from penstock.twin.exact import replay_journal

VOCAB = 128
SINGLES, PROGRAMS, TURNS = 40, 8, 4
OPEN_MAX = 20
SYSTEM = [[3 + (37 * index + 11 * number) % 120 for index in range(24 + 16 * number)] for number in range(3)]
SETTINGS = (
    TINY_REPLICA
    + """
running_max = 12
step_tokens = 64
[slo.chat]
ttft_p99_ms = 200
tpot_p99_ms = 20
[slo.batch]
e2e_p99_ms = 60000
[tenants.acme]
weight = 2
[tenants.zeta]
weight = 0.5
"""
)


def settings_of(preset: str, folder: Path) -> Settings:
    flags = {"preset": preset, "record.journal": str(folder / "journal.jsonl")}
    return resolve(
        file_text=SETTINGS, file_name="test", environ={}, flags=flags, load_preset=load_preset
    ).settings


# ---- the load ---------------------------------------------------------------------------------------------


def make_request(draw: random.Random, name: str, prompt: list[int], **changes: Any) -> Request:
    request = Request(
        id=name,
        prompt_len=len(prompt),
        max_output_tokens=draw.choice((1, draw.randint(2, 12), draw.randint(2, 60))),
        arrival_s=0.0,
        prompt_tokens=prompt,
        stop_token_ids=frozenset(draw.sample(range(VOCAB), 2)),
        sampling=SamplingParams(temperature=1.0, seed=draw.randrange(1000)),
        tenant=draw.choice(("acme", "zeta", "default")),
        slo_class=draw.choice(("chat", "batch", "default")),
        priority=draw.choice((0, 0, -1, 1)),
        slo=Slo(ttft_ms=50.0) if draw.random() < 0.1 else None,
    )
    return replace(request, **changes)


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, VOCAB) for _ in range(count)]


def single(draw: random.Random, index: int) -> list[Request]:
    """One request, or siblings of one prompt."""
    group = draw.randrange(3)
    shared = SYSTEM[group] if draw.random() < 0.6 else []
    prompt = [*shared, *tokens(draw, draw.choice((4, 40, 200)))]
    changes: dict[str, Any] = {}
    if shared and draw.random() < 0.5:
        changes = {"group_id": f"g{group}", "shared_len": len(shared)}
    if index % 9 == 4:
        changes["sampling"] = SamplingParams(temperature=1.0, prompt_logprobs=True)
    first = make_request(draw, f"r{index}-0", prompt, **changes)
    others = range(1, draw.choice((1, 1, 1, 3)))
    return [first, *(replace(first, id=f"r{index}-{number}", leader_id=first.id) for number in others)]


class Load:
    """What is still to be sent. A program's next turn is made of its last answer."""

    def __init__(self, seed: int) -> None:
        self._draw = draw = random.Random(seed)
        singles = [single(draw, index) for index in range(SINGLES)]
        firsts = [[self._turn(index, 0, [*SYSTEM[0], *tokens(draw, 10)])] for index in range(PROGRAMS)]
        calls = [*singles, *firsts]
        draw.shuffle(calls)
        self.ready = deque(request for call in calls for request in call)
        self.outputs: dict[str, list[int]] = {}

    def _turn(self, program: int, number: int, prompt: list[int]) -> Request:
        name = f"p{program}"
        return make_request(
            self._draw,
            f"{name}-t{number}",
            prompt,
            program_id=name,
            session_id=name,
            tool=self._draw.choice(("search", "python", None)),
            is_last_turn=number == TURNS - 1,
        )

    def ended(self, request: Request) -> None:
        if request.program_id is None or request.is_last_turn:
            return
        number = int(request.id.partition("-t")[2]) + 1
        answer = self.outputs[request.id]
        prompt = [*(request.prompt_tokens or ()), *answer, *tokens(self._draw, 5)]
        if len(prompt) < 200:
            self.ready.append(self._turn(int(request.program_id[1:]), number, prompt))


def drive(connection: Connection, load: Load) -> None:
    """Keep some open; cancel some at once and some after a few tokens."""
    open_requests: dict[str, Request] = {}
    sent = 0
    while load.ready or open_requests:
        while load.ready and len(open_requests) < OPEN_MAX:
            request = load.ready.popleft()
            open_requests[request.id] = request
            load.outputs[request.id] = []
            connection.send(Submit(request))
            sent += 1
            if sent % 12 == 5:
                connection.send(Cancel(request.id, CancelReason.CLIENT_DISCONNECT))
        assert connection.poll(WAIT_S), "the engine is silent"
        report = connection.recv()
        assert isinstance(report, StepReport)
        for event in report.events:
            if isinstance(event, Finished):
                load.ended(open_requests.pop(event.request_id))
            elif isinstance(event, TokenOut):
                output = load.outputs[event.request_id]
                output.append(event.token_id)
                if len(output) == 3 and sum(map(ord, event.request_id)) % 9 == 0:
                    connection.send(Cancel(event.request_id, CancelReason.STOP_STRING))


# ---- the run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=preset_names())
def journal(request: pytest.FixtureRequest, tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    with closing(EngineThread(settings_of(request.param, folder), tiny)) as engine:
        drive(engine.connection, Load(seed=5))
    assert not engine.failed, engine.failed
    return folder / "journal.jsonl"


def test_the_twin_makes_the_live_runs_plans(journal: Path) -> None:
    replayed = replay_journal(journal)
    assert replayed.difference is None, str(replayed.difference)
    assert replayed.plans > 100 and replayed.ends > SINGLES


def test_the_load_was_what_it_should_be(journal: Path) -> None:
    """Whatever the policies: there was something to decide."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    calls = Counter(line.get("call") for line in lines)
    plans = [line["plan"] for line in lines if line.get("plan")]
    submits = [line for line in lines if line.get("call") == "submit"]
    ends = Counter(end[1] for line in lines if line.get("call") == "complete" for end in line["finished"])
    assert calls["cancel"] > 4 and ends["stop"] > 3 and ends["length"] > 3
    assert sum("program_id" in line["hints"] for line in submits) > PROGRAMS
    assert sum("group_id" in line["hints"] for line in submits) > 3
    assert {line["tenant"] for line in submits} == {"acme", "zeta", "default"}
    assert any(start[3] for plan in plans for start in plan["starts"]), "prefixes were found"
    assert max(len(plan["starts"]) for plan in plans) > 1
