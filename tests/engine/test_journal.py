"""Law 6 on the real thing: a live engine process's journal, plan for plan, through a replica without tokens.

The load is mixed on purpose: shared prefixes, siblings (`n` > 1), a KV pool that is too small (preemption),
cancels while waiting and while running, stop tokens, a scored prompt. Whatever the timing of a run, the
replay must be equal; that the load did what it is for is read from the journal itself.
"""

from __future__ import annotations

import json
import queue
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_model import Source, write_tiny_llama

from penstock.core.errors import TraceError
from penstock.core.events import Finished, TokenOut
from penstock.core.reasons import CancelReason
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import PolicySettings, RecordSettings, ReplicaSettings, Settings
from penstock.engine.link import EngineLink
from penstock.replica.messages import ReplicaDied, StepReport
from penstock.twin.exact import replay_journal

WAIT_S = 60.0
SYSTEM = [5 + 37 * index % 90 for index in range(70)]  # the prefix that many prompts share
VOCAB = 128


def make_load(seed: int, count: int) -> list[Request]:
    draw = random.Random(seed)
    requests = []
    for index in range(count):
        own = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 60))]
        prompt = (SYSTEM if draw.random() < 0.6 else []) + own
        siblings = draw.choice((1, 1, 1, 2, 3))
        leader = f"r{index}-0"
        for sibling in range(siblings):
            sampling = SamplingParams(
                temperature=1.0, seed=index * 7 + sibling, prompt_logprobs=index % 9 == 4
            )
            requests.append(
                Request(
                    id=f"r{index}-{sibling}",
                    prompt_len=len(prompt),
                    max_output_tokens=draw.randint(1, 90),
                    arrival_s=0.0,
                    prompt_tokens=prompt,
                    stop_token_ids=frozenset(draw.sample(range(VOCAB), 2)),
                    sampling=sampling,
                    cache_salt="other" if index % 5 == 0 else "",
                    leader_id=leader if sibling else None,
                )
            )
    return requests


def drive(link: EngineLink, load: list[Request]) -> None:
    """Submit in waves as ends come in; cancel every seventh, some after their first token."""
    reports: queue.SimpleQueue[StepReport | ReplicaDied] = queue.SimpleQueue()
    link.on_report(reports.put)
    waiting, open_ids, seen = list(load), set[str](), set[str]()
    while waiting or open_ids:
        while waiting and len(open_ids) < 24:
            request = waiting.pop(0)
            open_ids.add(request.id)
            link.submit(request)
            if len(waiting) % 14 == 3:
                link.cancel(request.id, CancelReason.CLIENT_DISCONNECT)
        report = reports.get(timeout=WAIT_S)
        assert isinstance(report, StepReport)
        for event in report.events:
            if isinstance(event, Finished):
                open_ids.discard(event.request_id)
            elif isinstance(event, TokenOut) and event.request_id not in seen:
                seen.add(event.request_id)
                if len(seen) % 7 == 0:
                    link.cancel(event.request_id, CancelReason.STOP_STRING)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=["sarathi", "prefill-first"])
def recorded(request: pytest.FixtureRequest, tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a journal and a step trace of one engine process."""
    folder = tmp_path_factory.mktemp("recorded")
    settings = Settings(
        replica=ReplicaSettings(
            device="cpu", dtype="float32", threads=1, kv_memory="450KiB", kv_block_tokens=8,
            context_len=300, running_max=12, step_tokens=64, check_invariants_steps=1,
        ),
        policies=PolicySettings(compose=request.param),
        record=RecordSettings(journal=str(folder / "journal.jsonl"), steps=str(folder / "steps.jsonl")),
    )  # fmt: skip
    link = EngineLink(settings, tiny, "tiny")  # type: ignore[arg-type]
    try:
        link.wait_ready()
        drive(link, make_load(seed=3, count=60))
    finally:
        link.close(timeout_s=WAIT_S)
    return folder


def lines_of(folder: Path, name: str = "journal.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_twin_makes_the_live_runs_plans(recorded: Path) -> None:
    replayed = replay_journal(recorded / "journal.jsonl")
    assert replayed.difference is None, str(replayed.difference)
    lines = lines_of(recorded)
    plans = [line["plan"] for line in lines if line.get("plan")]
    assert replayed.calls == len(lines) - 1 and replayed.plans == len(plans) > 100


def test_the_load_was_what_it_should_be(recorded: Path) -> None:
    """A replay of nothing but easy steps would prove little."""
    lines = lines_of(recorded)
    calls = Counter(line.get("call") for line in lines)
    plans = [line["plan"] for line in lines if line.get("plan")]
    starts = Counter(start[1] for plan in plans for start in plan["starts"])
    ends = Counter(end[1] for line in lines if line.get("call") == "complete" for end in line["finished"])
    assert calls["cancel"] > 4 and ends["stop"] > 4 and ends["length"] > 4
    assert sum(count > 1 for count in starts.values()) > 2, "some were preempted and came back"
    assert sum(start[3] > 0 for plan in plans for start in plan["starts"]) > 10, "prefixes were found"
    assert any(plan["repeat"] > 1 for plan in plans)
    assert any(line["keys"] for line in lines if line.get("call") == "complete"), "outputs were keyed"


def test_the_journal_holds_keys_and_no_tokens(recorded: Path) -> None:
    assert ",".join(map(str, SYSTEM[:6])) not in (recorded / "journal.jsonl").read_text()
    keys = [key for line in lines_of(recorded) if line.get("call") == "submit" for key in line["keys"]]
    assert len(set(keys)) < len(keys), "shared prefixes have equal keys"


def change_line(
    folder: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], int]
) -> tuple[Path, int]:
    """A copy with one line changed; returns it and the number of the line, from 1."""
    lines = lines_of(folder)
    index = change(lines)
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, index + 1


def find(lines: list[dict[str, Any]], wanted: Callable[[dict[str, Any]], Any]) -> int:
    """A line in the middle of the journal or behind it."""
    return next(index for index in range(len(lines) // 2, len(lines)) if wanted(lines[index]))


def test_a_changed_plan_is_the_first_difference(recorded: Path, tmp_path: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> int:
        index = find(lines, lambda line: line.get("plan") and line["plan"]["new_blocks"])
        lines[index]["plan"]["new_blocks"][0][1][0] += 1
        return index

    path, number = change_line(recorded, tmp_path, change)
    difference = replay_journal(path).difference
    assert difference is not None and difference.line == number and "`new_blocks` of plan" in difference.what


def test_a_changed_stop_shows_in_what_follows(recorded: Path, tmp_path: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> int:
        index = find(lines, lambda line: line.get("stopped"))
        lines[index]["stopped"] = []
        return index

    path, number = change_line(recorded, tmp_path, change)
    difference = replay_journal(path).difference
    assert difference is not None and difference.line == number and "ends of plan" in difference.what


def test_a_call_left_out_shows_in_what_follows(recorded: Path, tmp_path: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> int:
        index = find(lines, lambda line: line.get("call") == "submit")
        del lines[index]
        return index

    path, number = change_line(recorded, tmp_path, change)
    difference = replay_journal(path).difference
    assert difference is not None and difference.line >= number


def test_a_time_that_runs_back_is_a_difference(recorded: Path, tmp_path: Path) -> None:
    def change(lines: list[dict[str, Any]]) -> int:
        index = find(lines, lambda line: line.get("finished"))
        lines[index]["at_s"] = 0.0
        return index

    path, number = change_line(recorded, tmp_path, change)
    difference = replay_journal(path).difference
    assert difference is not None and difference.line == number
    assert "time runs forward" in str(difference)


@pytest.mark.parametrize(
    ("field", "value"),
    [("call", "dance"), ("at_s", "soon"), ("prompt_len", 0), ("keys", [1]), ("tenant", None), ("reason", 3)],
)
def test_a_damaged_line_is_refused_by_name(recorded: Path, tmp_path: Path, field: str, value: object) -> None:
    def change(lines: list[dict[str, Any]]) -> int:
        index = find(lines, lambda line: field in line and line.get("call") in ("submit", "cancel"))
        lines[index][field] = value
        return index

    path, number = change_line(recorded, tmp_path, change)
    with pytest.raises(TraceError, match=f"line {number}, field `{field}`"):
        replay_journal(path)


def test_a_file_of_another_kind_is_refused(recorded: Path) -> None:
    with pytest.raises(TraceError, match="penstock-journal"):
        replay_journal(recorded / "steps.jsonl")


def test_step_records_agree_with_the_plans(recorded: Path) -> None:
    """Each record against a count made from nothing but the journal's plans."""
    plans = [line["plan"] for line in lines_of(recorded) if line.get("plan")]
    records = lines_of(recorded, "steps.jsonl")[1:]
    assert len(records) == len(plans)
    known: dict[int, int] = {}  # tokens of those that decode, the last sampled one included
    for plan, record in zip(plans, records, strict=True):
        for seq_id in plan["ends"]:
            known.pop(seq_id, None)
        advancing = [seq for seq in known if plan["decode_count"] and seq not in plan["paused"]]
        assert record["decodes"] == plan["decode_count"] == len(advancing)
        assert record["decode_context"] == sum(known[seq] for seq in advancing)
        assert record["prefills"] == [[count, start + count] for _, start, count, _ in plan["chunks"]]
        assert record["samples"] == len(advancing) + sum(chunk[3] for chunk in plan["chunks"])
        assert record["seconds"] > 0 and record["schedule_s"] > 0
        for seq in advancing:
            known[seq] += 1
        known |= {seq: start + count + 1 for seq, start, count, emits in plan["chunks"] if emits}
    assert [r["ended_s"] for r in records] == sorted(r["ended_s"] for r in records)


def test_recording_is_off_by_default() -> None:
    assert replace(Settings().record) == RecordSettings("", "", "")
