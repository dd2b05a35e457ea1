"""Recording: the request log and the line files under it."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from recorded import WAIT_S, end

from penstock.core import line_file
from penstock.core.errors import EnvironmentMissing
from penstock.core.line_file import LineFile
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.workloads import recording
from penstock.workloads.readers.request_log import block_counts
from penstock.workloads.recording import RequestLog, chain_ids
from penstock.workloads.source import ReadOptions, open_trace
from penstock.workloads.trace import TraceRow

BLOCK = 4


def record(path: Path, *ends: tuple[RequestOutcome, Request, list[int]], block: int = BLOCK) -> RequestLog:
    log = RequestLog(path, block, clock=lambda: 100.0, unix_time=lambda: 1_000_100.0)
    for each in ends:
        log.take(*each)
    log.close(WAIT_S)
    return log


def read(path: Path, **options: Any) -> list[TraceRow]:
    return list(open_trace(path, ReadOptions(**options)))


def test_rows_end_up_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = record(
        path,
        end("late", 103.0, [1] * 5, [2] * 3, tenant="acme", slo_class="chat"),
        end("early", 101.0, [1] * 9, [2]),
        end("gone", 102.0, [3], [], FinishReason.CANCELLED),
    )
    rows = read(path)
    assert [row.arrival_s for row in rows] == [0.0, 1.0, 2.0]
    assert [(row.prompt_tokens, row.output_tokens, row.failed) for row in rows] == [
        (9, 1, False), (1, 0, True), (5, 3, False)
    ]  # fmt: skip
    assert (rows[2].tenant, rows[2].slo_class, rows[2].elapsed_s) == ("acme", "chat", 0.75)
    assert (log.written, log.dropped) == (3, 0)
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    assert raw[1]["arrival_s"] == 1_000_101.0, "Unix time"
    assert [line.get("outcome") for line in raw[1:]] == ["stop", "cancelled", "stop"]
    assert [line.get("ttft_s") for line in raw[1:]] == [0.25, None, 0.25]


def test_a_later_turn_shares_the_blocks_of_prompt_and_answer(tmp_path: Path) -> None:
    first, answer, second = list(range(10)), [50, 51, 52, 53, 54, 55, 56], [7, 8]
    record(
        tmp_path / "log",
        end("a", 1.0, first, answer, session_id="s"),
        end("b", 2.0, first + answer + second, [1], session_id="s"),
        end("c", 3.0, first + [99] + answer, [1], session_id="t"),
        end("d", 4.0, first, answer, cache_salt="other"),
    )
    one, two, other, salted = read(tmp_path / "log")
    assert (
        one.block_hashes is not None and one.output_block_hashes is not None and two.block_hashes is not None
    )
    known = (*one.block_hashes[: 10 // BLOCK], *one.output_block_hashes)
    assert two.block_hashes[:4] == known and len(known) == 17 // BLOCK
    assert other.block_hashes is not None and other.block_hashes[:3] != known[:3]
    assert other.block_hashes[:2] == known[:2]
    assert salted.block_hashes is not None and not {*salted.block_hashes} & {*one.block_hashes}
    assert (one.turn, two.turn, other.turn) == (0, 1, 0)
    assert one.session_id == two.session_id != other.session_id


def test_two_logs_of_the_same_prompt_do_not_compare(tmp_path: Path) -> None:
    ids = set[int]()
    for name in ("one", "two"):
        record(tmp_path / name, end("a", 1.0, list(range(8)), [1], session_id="me@example.com"))
        (row,) = read(tmp_path / name)
        assert row.block_hashes is not None and not ids & {*row.block_hashes}
        ids |= {*row.block_hashes}
        assert "example" not in (tmp_path / name).read_text()


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("prompt_len", [1, 3, 15, 16, 17])
@pytest.mark.parametrize("output_len", [0, 1, 2, 15, 32])
def test_ids_are_as_many_as_readers_want(
    tmp_path: Path, block: int, prompt_len: int, output_len: int
) -> None:
    record(tmp_path / "log", end("a", 1.0, [1] * prompt_len, [2] * output_len), block=block)
    (row,) = read(tmp_path / "log")
    assert row.block_hashes is not None and row.output_block_hashes is not None
    counts = block_counts(prompt_len, output_len, block)
    assert (len(row.block_hashes), len(row.output_block_hashes)) == counts


def test_names_that_no_reader_takes_are_hashed(tmp_path: Path) -> None:
    record(tmp_path / "log", end("a", 1.0, [1], [2], tenant="x\x1b[31m", slo_class="y" * 999))
    (row,) = read(tmp_path / "log")
    assert row.tenant.isalnum() and row.slo_class.isalnum()


def test_a_crash_leaves_whole_lines(tmp_path: Path) -> None:
    """What was flushed before the end is a trace, though not in order of arrival."""
    path = tmp_path / "log"
    log = RequestLog(path, BLOCK, clock=lambda: 0.0, unix_time=lambda: 1e6)
    for index in range(200):
        log.take(*end(str(index), 500.0 - index, [1] * 50, [2] * 50))
    deadline = threading.Event()
    while len(path.read_bytes().splitlines()) < 201 and not deadline.wait(0.01):
        pass
    assert path.read_bytes().endswith(b"\n")
    assert len(read(path, sort=True)) == 200
    log.close(WAIT_S)
    assert len(read(path)) == 200


def test_a_writer_that_does_not_keep_up_drops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "QUEUE_ENDS_MAX", 3)
    may_write = threading.Event()
    write_line = LineFile.write_line

    def slow(self: LineFile, text: str) -> bool:
        may_write.wait(WAIT_S)
        return write_line(self, text)

    log = RequestLog(tmp_path / "log", BLOCK)
    monkeypatch.setattr(LineFile, "write_line", slow)
    for index in range(20):
        log.take(*end(str(index), float(index), [1], [2]))
    may_write.set()
    log.close(WAIT_S)
    assert log.written + log.dropped == 20 and log.dropped >= 16
    assert len(read(tmp_path / "log")) == log.written
    assert "dropped 16 rows" in caplog.text


def test_queued_tokens_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "QUEUE_TOKENS_MAX", 10)
    may_write = threading.Event()
    line_of = RequestLog._line_of

    def slow(self: RequestLog, each: Any) -> str:
        may_write.wait(WAIT_S)
        return line_of(self, each)

    monkeypatch.setattr(RequestLog, "_line_of", slow)
    log = RequestLog(tmp_path / "log", BLOCK)
    for index in range(4):
        log.take(*end(str(index), float(index), [1] * 10, [2]))
    may_write.set()
    log.close(WAIT_S)
    assert (log.written, log.dropped) == (1, 3)


def test_chains_depend_on_everything_before() -> None:
    salt = bytes(16)
    plain = chain_ids([1, 2, 3, 4, 5, 6], 2, b"", salt)
    changed = chain_ids([9, 2, 3, 4, 5, 6], 2, b"", salt)
    assert not set(plain) & set(changed) and len(plain) == 3
    assert chain_ids([1, 2, 3, 4], 2, b"", salt) == plain[:2]


# ---- line files


def test_what_is_there_already_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for number in range(3):
        file = LineFile(path, {"run": number})
        file.close()
        file.close()
    found = {each.name: json.loads(each.read_text())["run"] for each in tmp_path.iterdir()}
    assert found == {"file": 2, "file.1": 0, "file.2": 1}


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "file", tmp_path):
        with pytest.raises(EnvironmentMissing, match="cannot be written"):
            LineFile(path, {})


def test_the_size_limit_ends_a_recording_behind_a_whole_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = LineFile(tmp_path / "file", {}, bytes_max=300_000)
    written = sum(file.write({"text": "x" * 1000}) for _ in range(1000))
    assert not file.is_open and not file.write({})
    file.close()
    lines = (tmp_path / "file").read_text().splitlines()
    assert all(json.loads(line) is not None for line in lines)
    assert 200 < len(lines) == written + 1 and "recording to file has ended" in capsys.readouterr().err


def test_a_full_disk_ends_a_recording_behind_a_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = LineFile(tmp_path / "file", {"first": True})

    def fill_up(target: Any, content: bytes) -> None:
        target.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(line_file, "_write_all", fill_up)
    file.write({"text": "x" * 100})
    file.flush()
    assert not file.is_open and not file.write({})
    assert (tmp_path / "file").read_text() == '{"first":true}\n'
    assert "No space left" in capsys.readouterr().err
