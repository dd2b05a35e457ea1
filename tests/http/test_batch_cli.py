"""`penstock batch` as a command: what it refuses before it works, the preset it chooses, and Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.cli import batch
from penstock.core.errors import ConfigError, EnvironmentMissing, InvalidRequest
from penstock.core.request import Request
from penstock.core.settings import DeskSettings, Settings
from penstock.desk import Capacity, Desk
from penstock.gateway.batches.lines import JobFile, LineResult
from penstock.gateway.batches.offline import offline_settings
from penstock.gateway.batches.summary import summarised

URL = "http://server.test"


def line(custom_id: str) -> dict[str, Any]:
    body = {"model": "m", "prompt": "x"}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def job(folder: Path, count: int = 3) -> Path:
    path = folder / "job.jsonl"
    path.write_text("".join(json.dumps(line(f"q{index}")) + "\n" for index in range(count)))
    return path


def ids_in(path: Path) -> list[str]:
    return [json.loads(row)["custom_id"] for row in path.read_text().splitlines()]


def test_the_preset_for_jobs_holds_where_nobody_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert batch._settings_of(None, {}).policies.rank == "prefix-group"
    assert batch._settings_of(None, {"preset": "orca"}).preset == "orca"
    file = tmp_path / "own.toml"
    file.write_text('preset = "vllm"\n')
    assert batch._settings_of(file, {}).preset == "vllm"
    monkeypatch.setenv("PENSTOCK_PRESET", "sarathi")
    assert batch._settings_of(None, {}).preset == "sarathi"


def test_a_servers_bounds_do_not_hold_the_job_back() -> None:
    served = Settings(desk=DeskSettings(queue_requests_max=2, queue_tokens_max=9, tenant_requests_max=1))
    desk = Desk(offline_settings(served).desk, Capacity(4096, 16, 1 << 20, 4))
    for number in range(100):
        desk.enter([Request(id=f"r{number}", arrival_s=0.0, prompt_len=10, max_output_tokens=5)])
    assert desk.waiting_count == 100


def test_where_answers_cannot_go_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_run_here", lambda *_: pytest.fail("it began"))
    for out in (tmp_path / "none" / "out.jsonl", tmp_path):
        with pytest.raises(EnvironmentMissing, match="cannot be written") as caught:
            batch.batch(job(tmp_path), out=out)
        assert caught.value.hint is not None and "--out" in caught.value.hint
    with pytest.raises(EnvironmentMissing, match="is not a file"):
        batch.batch(Path())
    with pytest.raises(ConfigError, match="the file of requests itself"):
        batch.batch(job(tmp_path), out=tmp_path / "job.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["job.jsonl"]


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.jsonl"

    def serve(count: int, settings: Settings, file: JobFile, results: list[LineResult]) -> None:
        results += [LineResult(each, "r", body={}) for each in reversed(file.lines[:count])]
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "_serve", partial(serve, 0))
    with pytest.raises(KeyboardInterrupt):
        batch.batch(job(tmp_path), out=target)
    assert not target.exists(), "nothing was done"
    monkeypatch.setattr(batch, "_serve", partial(serve, 2))
    with pytest.raises(KeyboardInterrupt):
        batch.batch(job(tmp_path), out=target)
    assert ids_in(target) == ["q0", "q1"]
    assert f"2 results are kept in {target}" in capsys.readouterr().err


class Server:
    """A batch API with one batch, which ends when it is cancelled."""

    def __init__(self, done: int) -> None:
        self.done = done
        self.status = "in_progress"
        self.calls: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.calls.append(f"{request.method} {path}")
        request.read()
        if path == "/v1/files":
            return httpx.Response(200, json={"id": "file-1"})
        if path.endswith("/content"):
            return httpx.Response(200, text="".join(json.dumps(row) + "\n" for row in self.rows(path)))
        if path.endswith("/cancel"):
            self.status = "cancelled"
        batch = {
            "id": "batch_1",
            "status": self.status,
            "request_counts": {"total": 3, "completed": self.done, "failed": 0},
            "output_file_id": "output" if self.done else None,
            "error_file_id": "errors",
        }
        return httpx.Response(200, json=batch)

    def rows(self, path: str) -> list[dict[str, Any]]:
        answer = {"status_code": 200, "request_id": "r", "body": {}}
        ended = {"code": "batch_cancelled", "message": "The batch was cancelled."}
        if "output" in path:
            return [{"custom_id": f"q{i}", "response": answer, "error": None} for i in range(self.done)]
        return [{"custom_id": f"q{i}", "response": None, "error": ended} for i in range(self.done, 3)]


@pytest.fixture
def answered_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Server], None]:
    def use(server: Server) -> None:
        client = partial(httpx.Client, transport=httpx.MockTransport(server))
        monkeypatch.setattr(httpx, "Client", client)

    return use


@pytest.mark.parametrize("done", [0, 2])
def test_ctrl_c_cancels_the_servers_batch_and_keeps_what_is_done(
    done: int,
    answered_by: Callable[[Server], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, target = Server(done), tmp_path / "out.jsonl"
    answered_by(server)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.cli.batch_remote.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        batch.batch(job(tmp_path), out=target, url=URL)
    assert "POST /v1/batches/batch_1/cancel" in server.calls
    assert target.exists() == bool(done)
    if done:
        assert ids_in(target) == ["q0", "q1"]
        assert f"2 results are kept in {target}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests"),
        ("\n\n", "has no requests"),
        (json.dumps(line("q0")) + "\n\n{nope\n", "Line 3 of"),
        ("[1]\n", "Line 1 of"),
        ("[" * 100_000 + "\n", "Line 1 of"),
    ],
)
def test_a_file_of_no_requests_is_told_before_it_is_sent(
    text: str, message: str, answered_by: Callable[[Server], None], tmp_path: Path
) -> None:
    server, path = Server(0), tmp_path / "bad.jsonl"
    answered_by(server)
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        batch.batch(path, url=URL)
    assert not server.calls


def test_the_summary_says_why_the_first_request_failed() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    good = {"status_code": 200, "request_id": "r", "body": {"usage": usage}}
    bad = {"status_code": 400, "request_id": "r", "body": {"error": {"message": "`n` is 0."}}}
    ended = {"code": "batch_expired", "message": "The window was over."}
    answered = {"custom_id": "a", "response": good, "error": None}
    refused = {"custom_id": "b", "response": bad, "error": None}
    never_run = {"custom_id": "c", "response": None, "error": ended}
    assert summarised([answered], None, 1.0).first_failure is None
    found = summarised([answered, refused, never_run], None, 1.0)
    assert (found.answered, found.failed, found.output_tokens) == (1, 2, 2)
    assert found.first_failure == "b: `n` is 0."
    assert summarised([never_run], None, 1.0).first_failure == "c: The window was over."
