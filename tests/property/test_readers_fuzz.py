"""Whatever a file holds, reading it gives good rows or a TraceError, never anything else."""

from __future__ import annotations

import gzip
import json
import lzma
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import TraceError
from penstock.workloads.describe import describe
from penstock.workloads.readers import FORMATS
from penstock.workloads.source import ReadOptions, open_trace

HEADERS = (
    b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
    b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n",
    b'{"format": "penstock-request-log", "version": 1, "block_tokens": 4}\n',
    b'{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}\n',
    b"",
)
CELLS = st.sampled_from(
    [
        "0",
        "5",
        "17.5",
        "nan",
        "-1",
        "1e308",
        "",
        "ChatGPT",
        "Conversation log",
        "API log",
        '"',
        "\x00",
        "é",
        "\n",
    ]
    + ["2023-11-16 18:15:46.6805900", "2024-05-10 00:00:00+00:00", "9999-99-99 99:99:99", "9" * 30]
)
KEYS = st.sampled_from(
    ["timestamp", "input_length", "output_length", "hash_ids", "arrival_s", "prompt_tokens", "output_tokens"]
    + ["tenant", "slo_class", "session_id", "turn", "elapsed_s", "block_hashes", "outcome", "block_tokens"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.integers(0, 9) | st.just("stop")
CSV_LINES = st.lists(CELLS, max_size=9).map(lambda cells: ",".join(cells).encode())
JSON_LINES = st.dictionaries(KEYS, VALUES, max_size=9).map(lambda row: json.dumps(row).encode())
BODIES = st.lists(CSV_LINES | JSON_LINES | st.binary(max_size=30), max_size=6).map(b"\n".join)
FILES = st.tuples(st.sampled_from(HEADERS), BODIES).map(b"".join)


@contextmanager
def file_of(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        path.write_bytes(data)
        yield path


def check(path: Path, options: ReadOptions) -> None:
    try:
        rows = list(open_trace(path, options))
    except TraceError as error:
        assert error.hint
        assert error.message.isprintable()
        return
    assert rows
    assert rows[0].arrival_s == 0
    assert all(later.arrival_s >= row.arrival_s for row, later in zip(rows, rows[1:], strict=False))
    assert all(row.failed or (row.prompt_tokens >= 1 and row.output_tokens >= 1) for row in rows)
    assert describe(rows).rows == len(rows)


@given(FILES, st.sampled_from([None, *FORMATS]), st.booleans(), st.sampled_from([0.0, 3.0]))
@settings(max_examples=400, deadline=None)
def test_any_text(data: bytes, format_name: str | None, sort: bool, spread_s: float) -> None:
    with file_of(data) as path:
        check(path, ReadOptions(format_name, sort, spread_s))


@given(FILES, st.sampled_from([gzip.compress, lzma.compress]), st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_compressed_file(data: bytes, pack: object, drawn: st.DataObject) -> None:
    assert callable(pack)
    packed = bytearray(pack(data))
    at = drawn.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= drawn.draw(st.integers(1, 255))
    cut = drawn.draw(st.integers(0, len(packed)))
    for damaged in (packed, packed[:cut]):
        with file_of(bytes(damaged)) as path:
            check(path, ReadOptions())
