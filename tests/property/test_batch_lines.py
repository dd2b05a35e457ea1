"""Files of requests: any bytes are read or refused line by line, and results survive a cut at any byte."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import InvalidRequest
from penstock.gateway.batches import lines
from penstock.gateway.batches.lines import PROBLEMS_MAX, JobLine, LineResult, done_ids, read_job

TEXT = "/v1/completions"
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
rows = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.sampled_from(["a", "b", "c", "", "x\n", "\u2028"]) | values,
        "method": st.sampled_from(["POST", "POST", "GET"]) | values,
        "url": st.sampled_from([TEXT, TEXT, "/v1/chat/completions", "/v1/embeddings"]) | values,
        "body": st.just({"prompt": "é\u2028"}) | values,
    },
)
raw_lines = (
    rows.map(lambda row: json.dumps(row).encode())
    | rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", errors="replace"))
    | st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
)


@given(st.lists(raw_lines, max_size=12), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_line_is_a_request_or_a_problem(texts: list[bytes], end: bytes, ends_whole: bool) -> None:
    data = end.join(texts) + (end if ends_whole else b"")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job"
        path.write_bytes(data)
        file = read_job(path, TEXT, requests_max=1000)
        bodies = [file.body(line) for line in file.lines]
    numbers = [line.number for line in file.lines] + [problem.line or 0 for problem in file.problems]
    assert len(set(numbers)) == len(numbers) and len(file.problems) <= PROBLEMS_MAX
    assert len({line.custom_id for line in file.lines}) == len(file.lines)
    for line, body in zip(file.lines, bodies, strict=True):
        row = json.loads(data.split(b"\n")[line.number - 1])
        assert (row["custom_id"], row["url"], row["method"], row["body"]) == (
            line.custom_id,
            TEXT,
            "POST",
            body,
        )
    filled = sum(bool(text.strip()) for text in data.split(b"\n"))
    assert len(numbers) == max(1, filled) or (not filled and file.problems[0].code == "empty_file")


ids = st.text(min_size=1, max_size=6)


@given(st.lists(ids, unique=True, max_size=6), st.data())
@settings(max_examples=200, deadline=None)
def test_results_survive_a_cut_at_any_byte(custom_ids: list[str], data: st.DataObject) -> None:
    results: list[bytes] = []
    for number, custom_id in enumerate(custom_ids):
        line = JobLine(number, 0, 0, custom_id, TEXT)
        outcome: dict[str, Any] = data.draw(
            st.sampled_from(
                [
                    {"body": {"text": "a\u2028b"}},
                    {"error": InvalidRequest("no", param="prompt")},
                    {"ended": ("batch_expired", "late")},
                ]
            )
        )
        results.append(LineResult(line, f"id{number}", **outcome).encoded())
    whole = b"".join(results)
    cut = data.draw(st.integers(0, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results"
        assert done_ids(path) == set()
        path.write_bytes(whole[:cut])
        kept = sum(len(b"".join(results[: count + 1])) <= cut for count in range(len(results)))
        assert done_ids(path) == set(custom_ids[:kept])
        assert path.read_bytes() == b"".join(results[:kept])


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LINE_BYTES_MAX", 120)
    good = json.dumps({"custom_id": "a", "method": "POST", "url": TEXT, "body": {}}).encode()
    path = tmp_path / "job"
    path.write_bytes(b"x" * 1000 + b"\n" + good + b"\n" + b"y" * 120 + b"\n")
    file = read_job(path, TEXT, requests_max=10)
    assert [(problem.line, problem.code) for problem in file.problems] == [
        (1, "line_too_long"),
        (3, "line_too_long"),
    ]
    assert [line.number for line in file.lines] == [2] and file.body(file.lines[0]) == {}
