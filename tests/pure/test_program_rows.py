"""Generated runs of agents, and how traces and the twin carry them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.errors import TraceError
from penstock.twin.requests import RequestMaker
from penstock.workloads.convert import write_request_log
from penstock.workloads.exchange import PlannedRequest, _headers_of
from penstock.workloads.programs import TOOLS, ProgramShape, program_rows
from penstock.workloads.source import open_trace
from penstock.workloads.trace import TraceRow

SHAPE = ProgramShape(programs=20, rate_per_s=2.0, turns=(2, 5), prompt_tokens=(40, 90))


def by_program(rows: list[TraceRow]) -> dict[str, list[TraceRow]]:
    found: dict[str, list[TraceRow]] = {}
    for row in rows:
        found.setdefault(row.session_id or "", []).append(row)
    return found


def test_each_turn_holds_the_one_before() -> None:
    rows = list(program_rows(SHAPE))
    assert rows == list(program_rows(SHAPE)) != list(program_rows(SHAPE, seed=2))
    assert [row.arrival_s for row in rows] == sorted(row.arrival_s for row in rows)
    maker = RequestMaker(16)
    keys = [maker.make(number, row, row.arrival_s).block_keys for number, row in enumerate(rows)]
    place = {id(row): number for number, row in enumerate(rows)}
    for turns in by_program(rows).values():
        assert [row.turn for row in turns] == list(range(len(turns)))
        assert [row.is_last_turn for row in turns] == [False] * (len(turns) - 1) + [True]
        assert all(row.tool in {tool.name for tool in TOOLS} for row in turns[:-1])
        for before, after in zip(turns, turns[1:], strict=False):
            known = (before.prompt_tokens + before.output_tokens) // 16
            assert keys[place[id(after)]][:known] == keys[place[id(before)]][:known]  # type: ignore[index]
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens


def test_programs_share_nothing() -> None:
    owners: dict[int, str] = {}
    for row in program_rows(SHAPE):
        for block in row.block_hashes or ():
            assert owners.setdefault(block, row.session_id or "") == row.session_id


def test_some_calls_are_slow() -> None:
    slow = replace(SHAPE, programs=200, tools=[replace(tool, slow_frac=0.1) for tool in TOOLS])
    gaps = [
        after.arrival_s - before.arrival_s
        for turns in by_program(list(program_rows(slow))).values()
        for before, after in zip(turns, turns[1:], strict=False)
    ]
    assert 0.05 < sum(gap >= 10.0 for gap in gaps) / len(gaps) < 0.15


def test_a_request_log_keeps_tools_and_last_turns(tmp_path: Path) -> None:
    path = tmp_path / "programs.jsonl"
    rows = list(program_rows(SHAPE))
    write_request_log(rows, path)
    kept = list(open_trace(path))
    assert [(row.tool, row.is_last_turn) for row in kept] == [(row.tool, row.is_last_turn) for row in rows]
    request = RequestMaker(16).make(0, kept[0], 0.0)
    assert (request.program_id, request.tool) == (kept[0].session_id, kept[0].tool)


@pytest.mark.parametrize(("field", "value"), [("tool", "5"), ("tool", '""'), ("is_last_turn", '"yes"')])
def test_a_damaged_field_is_named(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(
        '{"format": "penstock-request-log", "version": 1}\n'
        f'{{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "{field}": {value}}}\n'
    )
    with pytest.raises(TraceError, match=field):
        list(open_trace(path))


def test_a_live_replay_tells_of_tools_and_last_turns() -> None:
    row = TraceRow(0.0, 8, 2, session_id="s", tool="shell")
    last = replace(row, tool=None, is_last_turn=True)
    told, told_last = (_headers_of(PlannedRequest(0, each, 0.0, b"")) for each in (row, last))
    assert told["x-penstock-tool"] == "shell" and "x-penstock-last-step" not in told
    assert told_last["x-penstock-last-step"] == "true" and "x-penstock-tool" not in told_last
    for odd in (" shell", "shell ", "x" * 127 + " y", "\u00e9"):
        headers = _headers_of(PlannedRequest(0, replace(row, tool=odd), 0.0, b""))
        assert "x-penstock-tool" not in headers, "no client sends such a header"
