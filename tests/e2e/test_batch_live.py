"""`penstock batch` on an engine of its own and through a server: equal answers, in the order of the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live import StartServer

PROGRAM = (sys.executable, "-m", "penstock.cli.main", "batch")
ENGINE = ("--threads", "1", "--dtype", "float32", "--kv-memory", "4MiB")
DOCUMENTS = ("The river rose and fell. " * 6, "A ship left the harbour. " * 6)


def requests_file(folder: Path, model: str = "tiny") -> Path:
    """Questions about two documents, in turn, and one request that no model can answer."""
    rows = [
        {
            "custom_id": f"q{index}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": model,
                "prompt": DOCUMENTS[index % 2] + f"Question {index}?",
                "max_tokens": 6,
                "temperature": 0,
                "ignore_eos": True,
            },
        }
        for index in range(10)
    ]
    rows[3]["body"] = {**rows[3]["body"], "temperature": 7}  # type: ignore[dict-item]
    path = folder / "job.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=300)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(rows: list[dict[str, Any]]) -> list[str | None]:
    return [
        row["response"]["body"]["choices"][0]["text"] if row["response"]["status_code"] == 200 else None
        for row in rows
    ]


@pytest.fixture(scope="module")
def here(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of a run without a server."""
    folder = tmp_path_factory.mktemp("here")
    path = requests_file(folder, model="whatever-the-file-says")
    done = run(str(path), "--model", str(tiny_folder), *ENGINE, "--json")
    assert done.returncode == 1, done.stderr  # one request failed
    summary = json.loads(done.stdout)
    assert (summary["requests"], summary["answered"], summary["failed"]) == (10, 9, 1)
    assert summary["saved_tokens"] == summary["planned_saved_tokens"] > 0
    assert summary["output_tokens"] == 9 * 6
    return rows_of(Path(summary["results"]))


def test_answers_are_in_the_order_of_the_file(here: list[dict[str, Any]]) -> None:
    assert [row["custom_id"] for row in here] == [f"q{index}" for index in range(10)]
    assert here[3]["response"]["status_code"] == 400
    assert here[3]["response"]["body"]["error"]["param"] == "temperature"
    assert all(
        row["response"]["body"]["model"] == "whatever-the-file-says" for row in here if row is not here[3]
    )


def test_a_server_gives_the_same_answers(
    here: list[dict[str, Any]], serve: StartServer, tmp_path: Path
) -> None:
    server = serve("--preset", "batchllm", settings={"batch.folder": str(tmp_path / "kept")})
    out = tmp_path / "out.jsonl"
    done = run(str(requests_file(tmp_path)), "--url", server.url, "--out", str(out))
    assert done.returncode == 1, done.stderr
    assert "answered  9 of 10 requests, 1 failed" in done.stdout
    rows = rows_of(out)
    assert [row["custom_id"] for row in rows] == [f"q{index}" for index in range(10)]
    assert texts_of(rows) == texts_of(here)
    with httpx.Client(trust_env=False) as http:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http)
        assert client.batches.list().data[0].request_counts is not None
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


def test_a_server_without_a_folder_says_so(serve: StartServer, tmp_path: Path) -> None:
    done = run(str(requests_file(tmp_path)), "--url", serve().url)
    assert done.returncode == 3 and "batch.folder" in done.stderr


def test_bad_files_and_flags_are_told_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"custom_id": "a"}\nnot json\n')
    done = run(str(path))
    assert done.returncode == 1 and "line 1: `method`" in done.stderr and "line 2:" in done.stderr
    assert not (tmp_path / "bad.results.jsonl").exists()
    assert run(str(tmp_path / "none.jsonl")).returncode == 3
    assert run(str(path), "--out", str(path)).returncode == 2
    assert run(str(path), "--url", "nonsense").returncode == 2
    good = requests_file(tmp_path)
    assert run(str(good), "--url", "http://127.0.0.1:9").returncode == 3
