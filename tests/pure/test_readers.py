"""Trace readers: each format's fields, and every kind of damage named with file, line and field."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError, TraceError
from penstock.workloads import lines as lines_module
from penstock.workloads import source as source_module
from penstock.workloads.convert import write_request_log
from penstock.workloads.source import ReadOptions, open_trace
from penstock.workloads.trace import TraceRow

BURST_1 = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_3 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
LOG = '{"format": "penstock-request-log", "version": 1, "block_tokens": 16}\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_text(text: str) -> Path:
        path = tmp_path / "trace.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def read(path: Path | str, **options: object) -> list[TraceRow]:
    return list(open_trace(path, ReadOptions(**options)))  # type: ignore[arg-type]


def failure(path: Path, **options: object) -> TraceError:
    with pytest.raises(TraceError) as caught:
        read(path, **options)
    assert caught.value.hint, "a trace error names the way out"
    return caught.value


def test_burstgpt_one_reads_classes_and_failures(write: Write) -> None:
    rows = read(write(BURST_1 + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,0,0,0,API log\n"))
    assert [(row.arrival_s, row.prompt_tokens, row.output_tokens) for row in rows] == [
        (0, 472, 18),
        (40, 0, 0),
    ]
    assert [row.slo_class for row in rows] == ["chat", "api"]
    assert [row.model for row in rows] == ["ChatGPT", "GPT-4"]
    assert [row.failed for row in rows] == [False, True]


def test_burstgpt_three_numbers_the_turns_of_sessions(write: Write) -> None:
    text = BURST_3 + "".join(
        f"{at},{session},{elapsed},GPT-4,10,20,30,Conversation log\n"
        for at, session, elapsed in [(1.5, "a", 3), (2, "b", ""), (9, "a", 1.25), (10, "", 2)]
    )
    rows = read(write(text))
    assert [(row.session_id, row.turn) for row in rows] == [("a", 0), ("b", 0), ("a", 1), (None, 0)]
    assert [row.elapsed_s for row in rows] == [3, None, 1.25, 2]


def test_columns_are_found_by_name(write: Write) -> None:
    rows = read(write("Log Type,Response tokens,Request tokens,Model,Timestamp,Extra\nAPI log,2,1,m,7,x\n"))
    assert (rows[0].prompt_tokens, rows[0].output_tokens, rows[0].slo_class) == (1, 2, "api")


@pytest.mark.parametrize(
    ("stamps", "gap_s"),
    [
        (("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:46.6805901"), 1e-7),
        (("2024-05-10 00:00:00+00:00", "2024-05-10 00:00:00.009930+00:00"), 0.00993),
        (("2024-05-10T23:59:59Z", "2024-05-11T00:00:00Z"), 1),
        (("2024-05-10 02:00:00+02:00", "2024-05-10 00:00:01+00:00"), 1),
    ],
)
def test_azure_stamps(write: Write, stamps: tuple[str, str], gap_s: float) -> None:
    rows = read(write(AZURE + "".join(f"{stamp},374,44\n" for stamp in stamps)))
    assert rows[1].arrival_s == pytest.approx(gap_s, rel=1e-3)
    assert (rows[0].prompt_tokens, rows[0].output_tokens) == (374, 44)


def test_mooncake_blocks(write: Write) -> None:
    row = {"timestamp": 27_000, "input_length": 1025, "output_length": 7, "hash_ids": [0, 4, 9]}
    rows = read(write(json.dumps(row | {"timestamp": 24_000}) + "\n" + json.dumps(row)))
    assert [entry.arrival_s for entry in rows] == [0, 3]
    assert (rows[0].block_hashes, rows[0].block_tokens) == ((0, 4, 9), 512)


def test_own_log_survives_a_round_trip(tmp_path: Path) -> None:
    rows = [
        TraceRow(0.0, 40, 5, "acme", "chat", "m", "s", 1, (7, 8, 1 << 63), 16, 1.5),
        TraceRow(0.1234567, 1, 1, block_tokens=16),
        TraceRow(2.0, 0, 0, failed=True, block_tokens=16),
    ]
    out = tmp_path / "log.jsonl.gz"
    assert write_request_log(rows, out) == 3
    assert read(out) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl.gz"]


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, lambda data: data])
def test_compression_is_found_by_content(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "no_extension"
    path.write_bytes(pack((BURST_1 + "5,m,1,2,3,API log\r\n" * 1000).encode()))
    assert len(read(path)) == 1000


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_truncated_file_is_an_error(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "cut"
    path.write_bytes(pack((BURST_1 + "5,m,1,2,3,API log\n" * 100_000).encode())[:-30])
    assert "truncated or damaged" in failure(path).message


def test_a_decompression_bomb_ends_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "TRACE_BYTES_MAX", 1 << 22)
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress((BURST_1 + "5,m,1,2,3,API log\n" * 500_000).encode()))
    assert "unpacks to more than" in failure(path).message


def test_an_endless_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(gzip.compress(bytes(20 << 20)))
    assert "line is longer" in failure(path).message


BURST_ROW = "5,ChatGPT,472,18,490,Conversation log\n"


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        (BURST_1 + BURST_ROW + "nan,m,1,2,3,API log\n", 3, "Timestamp"),
        (BURST_1 + "inf,m,1,2,3,API log\n", 2, "Timestamp"),
        (BURST_1 + "-1,m,1,2,3,API log\n", 2, "Timestamp"),
        (BURST_1 + "1e30,m,1,2,3,API log\n", 2, "Timestamp"),
        (BURST_1 + "x,m,1,2,3,API log\n", 2, "Timestamp"),
        (BURST_1 + BURST_ROW + "4,m,1,2,3,API log\n", 3, "time"),
        (BURST_1 + "5,m,-1,2,3,API log\n", 2, "Request tokens"),
        (BURST_1 + "5,m,99999999999,2,3,API log\n", 2, "Request tokens"),
        (BURST_1 + "5,m,1_0,2,3,API log\n", 2, "Request tokens"),
        (BURST_1 + "5,m,1,2.5,3,API log\n", 2, "Response tokens"),
        (BURST_1 + "5,m,0,2,3,API log\n", 2, "Request tokens"),
        (BURST_1 + "5,m,1,2,3,Debug log\n", 2, "Log Type"),
        (BURST_1 + "5,\x1b[31m,1,2,3,API log\n", 2, "Model"),
        (BURST_1 + "5,m,1,2,API log\n", 2, None),
        (BURST_1 + '5,"m,1,2,3,API log\n', 2, None),
        ("Timestamp,Request tokens,Response tokens\n", 1, "Model"),
        (AZURE + "2023-13-16 18:15:46,1,2\n", 2, "TIMESTAMP"),
        (AZURE + "yesterday,1,2\n", 2, "TIMESTAMP"),
        (AZURE + "2023-11-16 18:15:46,1,\n", 2, "GeneratedTokens"),
        ('{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1]}', 1, "hash_ids"),
        ('{"timestamp": 1, "input_length": 6, "output_length": 1, "hash_ids": [-1]}', 1, "hash_ids"),
        ('{"timestamp": 1, "input_length": 6, "output_length": 1, "hash_ids": {}}', 1, "hash_ids"),
        ('{"timestamp": NaN, "input_length": 6, "output_length": 1}', 1, "timestamp"),
        ('{"timestamp": "82", "input_length": 6, "output_length": 1}', 1, "timestamp"),
        ('{"timestamp": 1, "input_length": true, "output_length": 1}', 1, "input_length"),
        ('{"timestamp": 1, "input_length": 6, "output_length": 1}\n{"timestamp": 2}', 2, "input_length"),
        (LOG.replace("1,", "2,"), 1, "version"),
        (LOG + '{"arrival_s": 1, "prompt_tokens": 4}', 2, "output_tokens"),
        (LOG + '{"arrival_s": 1, "prompt_tokens": 4, "output_tokens": 1, "outcome": "won"}', 2, "outcome"),
        (LOG + '{"arrival_s": 1, "prompt_tokens": 4, "output_tokens": 1, "tenant": ""}', 2, "tenant"),
        (LOG + "[" * 100_000, 2, None),
        ("hello,world\n", 1, None),
    ],
)
def test_damage_is_named(write: Write, text: str, line: int, field: str | None) -> None:
    error = failure(write(text))
    assert error.message.startswith(f"`trace.txt` line {line}")
    if field is not None:
        assert f"field `{field}`" in error.message
    assert error.message.isprintable(), "nothing from the file reaches the terminal raw"


@pytest.mark.parametrize("text", ["", "\n\n", BURST_1, AZURE, LOG])
def test_a_trace_without_rows_is_an_error(write: Write, text: str) -> None:
    assert "no rows" in failure(write(text)).message


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin"
    path.write_bytes(BURST_1.encode() + b"5,caf\xe9,1,2,3,API log\n")
    assert "line 2: it is not UTF-8" in failure(path).message


def test_missing_file_and_unknown_names(tmp_path: Path) -> None:
    assert "cannot be read" in failure(tmp_path / "absent").message
    assert "cannot be read" in failure(tmp_path).message
    with pytest.raises(TraceError, match="no bundled trace"):
        open_trace("sample:nothing")
    with pytest.raises(ConfigError, match="not a trace format"):
        open_trace("sample:burstgpt1", ReadOptions(format="parquet"))


def test_format_overrides_detection(write: Write) -> None:
    assert "line 1, field `TIMESTAMP`" in failure(write(BURST_1 + BURST_ROW), format="azure").message


def test_sort_mends_inversions_and_keeps_ties_in_file_order(write: Write) -> None:
    text = BURST_1 + "".join(f"{at},m{i},1,2,3,API log\n" for i, at in enumerate([5, 9, 7, 9, 3]))
    rows = read(write(text), sort=True)
    assert [(row.arrival_s, row.model) for row in rows] == [
        (0, "m4"),
        (2, "m0"),
        (4, "m2"),
        (6, "m1"),
        (6, "m3"),
    ]


def test_sort_is_bounded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "SORT_ROWS_MAX", 2)
    text = BURST_1 + "".join(f"{at},m,1,2,3,API log\n" for at in [5, 6, 7, 8, 1])
    assert "goes back" in failure(write(text), sort=True).message


def test_spread_spaces_rows_of_one_stamp(write: Write) -> None:
    text = BURST_1 + "".join(f"{at},m,1,2,3,API log\n" for at in [0, 0, 0, 2, 10, 10])
    assert [row.arrival_s for row in read(write(text), spread_s=3.0)] == pytest.approx(
        [0, 2 / 3, 4 / 3, 2, 10, 11.5]
    )


def test_a_trace_can_be_read_twice() -> None:
    trace = open_trace("sample:burstgpt3")
    assert list(trace) == list(trace)
    assert trace.format.name == "burstgpt"
