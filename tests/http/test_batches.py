"""Files and batches through the official client: answers in files, in order, once, across restarts."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_link import FakeLink
from served import Running, make_settings, wait_until

from penstock.core.settings import BatchSettings, Settings
from penstock.gateway.batches.lines import PROBLEMS_MAX

Serve = Callable[..., Running]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def batch_settings(folder: Path, **changes: Any) -> Settings:
    return make_settings(batch=replace(BatchSettings(folder=str(folder)), **changes))


def line(custom_id: str, prompt: str = "hello", url: str = TEXT, **body: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"model": "fake", "max_tokens": 4, "temperature": 0, **body}
    if url == CHAT:
        given["messages"] = [{"role": "user", "content": prompt}]
    else:
        given["prompt"] = prompt
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


def jsonl(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def upload(client: openai.OpenAI, data: bytes) -> str:
    return client.files.create(file=("job.jsonl", data), purpose="batch").id


def wait_end(client: openai.OpenAI, batch_id: str) -> Any:
    ends = ("completed", "failed", "expired", "cancelled")
    wait_until(lambda: client.batches.retrieve(batch_id).status in ends, "the batch ends")
    return client.batches.retrieve(batch_id)


def run_batch(client: openai.OpenAI, rows: Sequence[dict[str, Any]], endpoint: str = TEXT) -> Any:
    made = client.batches.create(
        input_file_id=upload(client, jsonl(rows)), endpoint=endpoint, completion_window="24h"
    )
    return wait_end(client, made.id)


def rows_of(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    if file_id is None:
        return {}
    rows = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows), "each request has one result"
    return {row["custom_id"]: row for row in rows}


@pytest.mark.parametrize("endpoint", [CHAT, TEXT])
def test_a_batch_answers_as_single_calls_do(serve: Serve, tmp_path: Path, endpoint: str) -> None:
    running = serve(batch_settings(tmp_path))
    client = running.openai()
    prompts = {f"q{index}": f"What is {index}?" for index in range(30)}
    ended = run_batch(client, [line(name, text, endpoint) for name, text in prompts.items()], endpoint)
    assert ended.status == "completed" and ended.error_file_id is None
    assert (ended.request_counts.total, ended.request_counts.completed) == (30, 30)
    assert ended.in_progress_at <= ended.finalizing_at <= ended.completed_at <= ended.expires_at
    rows = rows_of(client, ended.output_file_id)
    assert rows.keys() == prompts.keys()
    for name, text in prompts.items():
        response = rows[name]["response"]
        assert response["status_code"] == 200 and rows[name]["error"] is None
        if endpoint == CHAT:
            alone: Any = client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": text}], max_tokens=4, temperature=0
            )
            assert response["body"]["choices"][0]["message"]["content"] == alone.choices[0].message.content
        else:
            alone = client.completions.create(model="fake", prompt=text, max_tokens=4, temperature=0)
            assert response["body"]["choices"][0]["text"] == alone.choices[0].text
        assert response["body"]["usage"]["completion_tokens"] == alone.usage.completion_tokens
    running.wait_idle()


def test_requests_that_share_a_prefix_travel_as_a_group(serve: Serve, tmp_path: Path) -> None:
    running = serve(batch_settings(tmp_path))
    documents = {"a": "A" * 64, "b": "B" * 64}
    rows = [
        line(f"{name}{index}", documents[name] + f" question {index}") for index in range(4) for name in "ab"
    ]
    ended = run_batch(running.openai(), rows)
    assert ended.status == "completed"
    groups: dict[str | None, list[bytes]] = {}
    for request in running.link.submitted:
        assert request.slo_class == "batch" and request.shared_len == 64 // 16 * 16
        groups.setdefault(request.group_id, []).append(bytes(request.prompt_tokens or ())[:1])
    assert sorted(set(group) for group in groups.values()) == [{b"A"}, {b"B"}]
    order = [request.group_id for request in running.link.submitted]
    assert order == sorted(order, key=order.index), "one group after the other"


def test_lines_that_cannot_be_answered_go_to_the_error_file(serve: Serve, tmp_path: Path) -> None:
    link = FakeLink(fail_on=b"poison")
    client = serve(batch_settings(tmp_path), link).openai()
    rows = [
        line("good"),
        line("hot", temperature=9),
        line("long", "x" * 5000),
        line("other", model="gpt-9"),
        line("stream", stream=True),
        line("tools", tools=[{"type": "function"}]),
        line("bad engine", "poison"),
    ]
    ended = run_batch(client, rows)
    assert ended.status == "completed"
    assert (ended.request_counts.completed, ended.request_counts.failed) == (1, 6)
    assert rows_of(client, ended.output_file_id).keys() == {"good"}
    errors = rows_of(client, ended.error_file_id)
    found = {
        name: (row["response"]["status_code"], row["response"]["body"]["error"]["param"])
        for name, row in errors.items()
    }
    assert found == {
        "hot": (400, "temperature"),
        "long": (400, "prompt"),
        "other": (404, "model"),
        "stream": (400, "stream"),
        "tools": (400, "tools"),
        "bad engine": (500, None),
    }


def test_a_file_with_bad_lines_fails_and_says_which(serve: Serve, tmp_path: Path) -> None:
    client = serve(batch_settings(tmp_path)).openai()
    good = line("a")
    data = b"\n".join(
        [
            json.dumps(good).encode(),
            b"{not json",
            b"",
            b"[]",
            json.dumps(good).encode(),
            json.dumps({**good, "custom_id": ""}).encode(),
            json.dumps({**good, "custom_id": "g", "method": "GET"}).encode(),
            json.dumps({**good, "custom_id": "u", "url": CHAT}).encode(),
            json.dumps({**good, "custom_id": "b", "body": []}).encode(),
        ]
    )
    made = client.batches.create(
        input_file_id=upload(client, data), endpoint=TEXT, completion_window="24h", metadata={"who": "me"}
    )
    ended = wait_end(client, made.id)
    assert ended.status == "failed" and ended.failed_at and ended.metadata == {"who": "me"}
    assert [(problem.line, problem.code) for problem in ended.errors.data] == [
        (2, "invalid_json_line"),
        (4, "invalid_json_line"),
        (5, "duplicate_custom_id"),
        (6, "invalid_custom_id"),
        (7, "invalid_method"),
        (8, "invalid_url"),
        (9, "invalid_body"),
    ]
    assert ended.output_file_id is None


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_file_fails(serve: Serve, tmp_path: Path, data: bytes) -> None:
    client = serve(batch_settings(tmp_path)).openai()
    made = client.batches.create(input_file_id=upload(client, data), endpoint=TEXT, completion_window="24h")
    assert wait_end(client, made.id).errors.data[0].code == "empty_file"


def test_problems_and_requests_are_bounded(serve: Serve, tmp_path: Path) -> None:
    client = serve(batch_settings(tmp_path, requests_max=10)).openai()
    bad = client.batches.create(
        input_file_id=upload(client, b"x\n" * 1000), endpoint=TEXT, completion_window="24h"
    )
    assert len(wait_end(client, bad.id).errors.data) == PROBLEMS_MAX
    ended = run_batch(client, [line(f"r{index}") for index in range(11)])
    assert ended.status == "failed" and ended.errors.data[0].code == "too_many_requests"


def test_cancel_keeps_what_is_done(serve: Serve, tmp_path: Path) -> None:
    link = FakeLink(step_s=0.002)
    running = serve(batch_settings(tmp_path, in_flight_max=2), link)
    client = running.openai()
    made = client.batches.create(
        input_file_id=upload(client, jsonl([line(f"r{index}") for index in range(200)])),
        endpoint=TEXT,
        completion_window="24h",
    )
    wait_until(lambda: client.batches.retrieve(made.id).request_counts.completed >= 3, "some are done")
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    ended = wait_end(client, made.id)
    assert ended.status == "cancelled" and ended.cancelled_at >= ended.cancelling_at
    answers, errors = rows_of(client, ended.output_file_id), rows_of(client, ended.error_file_id)
    assert len(answers) >= 3 and len(answers) + len(errors) == 200 and not answers.keys() & errors.keys()
    assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        client.batches.cancel(made.id)
    running.wait_idle()


def test_a_batch_whose_window_is_over_expires(serve: Serve, tmp_path: Path) -> None:
    """The clock cannot be turned, so the record is: as if its server had been down for a day."""
    running = serve(batch_settings(tmp_path, in_flight_max=1), FakeLink(step_s=0.005))
    client = running.openai()
    made = client.batches.create(
        input_file_id=upload(client, jsonl([line(f"r{index}") for index in range(500)])),
        endpoint=TEXT,
        completion_window="1m",
    )
    wait_until(lambda: client.batches.retrieve(made.id).request_counts.completed >= 2, "some are done")
    running.stop()
    path = tmp_path / "batches" / f"{made.id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "expires_s": made.created_at}))
    client = serve(batch_settings(tmp_path)).openai()
    ended = wait_end(client, made.id)
    assert ended.status == "expired" and ended.expired_at
    answers, errors = rows_of(client, ended.output_file_id), rows_of(client, ended.error_file_id)
    assert len(answers) >= 2 and len(answers) + len(errors) == 500
    assert {row["error"]["code"] for row in errors.values()} == {"batch_expired"}


def test_a_restart_goes_on_and_runs_nothing_twice(serve: Serve, tmp_path: Path) -> None:
    first = serve(batch_settings(tmp_path, in_flight_max=2), FakeLink(step_s=0.003))
    client = first.openai()
    names = [f"r{index}" for index in range(60)]
    made = client.batches.create(
        input_file_id=upload(client, jsonl([line(name, f"say {name}") for name in names])),
        endpoint=TEXT,
        completion_window="24h",
    )
    wait_until(lambda: client.batches.retrieve(made.id).request_counts.completed >= 5, "some are done")
    first.stop()
    gathered = tmp_path / "batches" / f"{made.id}.output"
    done = {json.loads(text)["custom_id"] for text in gathered.read_text().splitlines()}
    with gathered.open("ab") as file:
        file.write(b'{"custom_id": "torn')  # as a crash in the middle of a write leaves it
    second = serve(batch_settings(tmp_path))
    client = second.openai()
    ended = wait_end(client, made.id)
    assert ended.status == "completed" and ended.request_counts.completed == 60
    assert rows_of(client, ended.output_file_id).keys() == set(names)
    again = {bytes(request.prompt_tokens or ()).decode() for request in second.link.submitted}
    assert 5 <= len(done) and again == {f"say {name}" for name in names if name not in done}


def test_online_requests_come_first(serve: Serve, tmp_path: Path) -> None:
    """The background has a window of its own, and opens nothing while somebody waits at the desk."""
    link = FakeLink(step_s=0.005)
    running = serve(batch_settings(tmp_path, in_flight_max=3), link)
    client = running.openai()
    client.batches.create(
        input_file_id=upload(client, jsonl([line(f"r{index}", max_tokens=50) for index in range(100)])),
        endpoint=TEXT,
        completion_window="24h",
    )
    wait_until(lambda: link.running_count == 3, "the window is full")
    for _ in range(5):
        client.completions.create(model="fake", prompt="online", max_tokens=4)
    in_flight = [request for request in link.submitted if request.slo_class == "batch"]
    assert link.running_most <= 3 + 1 and len(in_flight) < 100
    assert all(request.priority > 0 for request in in_flight)


def test_files_are_listed_described_and_deleted(serve: Serve, tmp_path: Path) -> None:
    client = serve(batch_settings(tmp_path)).openai()
    ids = [upload(client, jsonl([line(f"r{index}")])) for index in range(5)]
    file = client.files.retrieve(ids[0])
    assert (file.filename, file.purpose, file.object) == ("job.jsonl", "batch", "file")
    assert file.bytes == len(client.files.content(ids[0]).content)
    assert [each.id for each in client.files.list(order="asc")] == ids
    page = client.files.list(limit=2)
    assert [each.id for each in page.data] == ids[:2:-1] and page.has_more
    assert [each.id for each in client.files.list(limit=2)] == ids[::-1]  # the client follows the pages
    assert client.files.delete(ids[0]).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(ids[0])
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=ids[0], endpoint=TEXT, completion_window="24h")


@pytest.mark.parametrize(
    ("param", "value"),
    [("limit", "0"), ("limit", "x"), ("limit", "10001"), ("order", "up"), ("after", "nobody")],
)
def test_a_wrong_query_is_named(serve: Serve, tmp_path: Path, param: str, value: str) -> None:
    client = serve(batch_settings(tmp_path)).openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.list(extra_query={param: value})
    assert caught.value.param == param


def test_a_file_whose_bytes_are_gone_is_forgotten(serve: Serve, tmp_path: Path) -> None:
    first = serve(batch_settings(tmp_path))
    file_id = upload(first.openai(), jsonl([line("a")]))
    first.stop()
    (tmp_path / "files" / f"{file_id}.data").unlink()
    assert not list(serve(batch_settings(tmp_path)).openai().files.list())
    assert not list((tmp_path / "files").iterdir())


def test_batches_are_listed_in_pages(serve: Serve, tmp_path: Path) -> None:
    client = serve(batch_settings(tmp_path)).openai()
    made = [run_batch(client, [line("a")]).id for _ in range(3)]
    assert [each.id for each in client.batches.list(limit=2)] == made[::-1]


def test_an_input_in_use_is_not_deleted(serve: Serve, tmp_path: Path) -> None:
    client = serve(batch_settings(tmp_path), FakeLink(step_s=0.05)).openai()
    file_id = upload(client, jsonl([line("slow", max_tokens=200)]))
    made = client.batches.create(input_file_id=file_id, endpoint=TEXT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        client.files.delete(file_id)
    client.batches.cancel(made.id)
    wait_end(client, made.id)
    assert client.files.delete(file_id).deleted


def test_uploads_are_bounded(serve: Serve, tmp_path: Path) -> None:
    client = serve(batch_settings(tmp_path, file_bytes_max=2000, files_max=2)).openai()
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, b"x" * 200_000)
    assert caught.value.status_code == 413
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, b"x" * 2001)
    assert caught.value.status_code == 413
    upload(client, b"x" * 2000)
    upload(client, b"x")
    with pytest.raises(openai.RateLimitError, match="no room"):
        upload(client, b"x")
    assert len(list((tmp_path / "files").glob("*.data"))) == 2
    assert not list((tmp_path / "files").glob("*.part"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"completion_window": "24h", "endpoint": TEXT}, "input_file_id"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "999d"}, "completion_window"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"metadata": {"k": "v" * 600}}, "metadata.k"),
    ],
)
def test_a_bad_batch_is_refused_by_field(
    serve: Serve, tmp_path: Path, body: dict[str, Any], param: str
) -> None:
    running = serve(batch_settings(tmp_path))
    good = {"endpoint": TEXT, "completion_window": "24h"}
    if param != "input_file_id":
        body = {**good, "input_file_id": upload(running.openai(), b"{}"), **body}
    answer = running.http().post("/v1/batches", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({"file": ("a", b"x")}, {}, "purpose"),
        ({"file": ("a", b"x")}, {"purpose": "fine-tune"}, "purpose"),
        ({"other": ("a", b"x")}, {"purpose": "batch"}, "file"),
    ],
)
def test_a_bad_upload_is_refused_by_field(
    serve: Serve, tmp_path: Path, files: Any, data: dict[str, str], param: str
) -> None:
    answer = serve(batch_settings(tmp_path)).http().post("/v1/files", files=files, data=data)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert not list((tmp_path / "files").iterdir())


def test_without_a_folder_the_api_is_off_and_says_so(gateway: Running) -> None:
    for method, path in (("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/batches/batch_1")):
        answer = gateway.http().request(method, path)
        assert answer.status_code == 404 and "batch.folder" in answer.json()["error"]["message"]


def test_a_key_is_needed_where_there_are_keys(serve: Serve, tmp_path: Path) -> None:
    settings = batch_settings(tmp_path)
    running = serve(replace(settings, gateway=replace(settings.gateway, api_keys=("secret",))))
    for path in ("/v1/files", "/v1/batches", "/v1/files/x/content"):
        assert running.http().get(path).status_code == 401
    assert running.openai(api_key="secret").batches.list().data == []


def test_paths_cannot_leave_the_folder(serve: Serve, tmp_path: Path) -> None:
    http = serve(batch_settings(tmp_path / "kept")).http()
    (tmp_path / "secret.data").write_text("no")
    for name in ("..%2F..%2Fsecret", "../secret", "%00", "x" * 5000):
        assert http.get(f"/v1/files/{name}/content").status_code in (404, 400)


def test_two_servers_do_not_share_a_folder(serve: Serve, tmp_path: Path) -> None:
    serve(batch_settings(tmp_path))
    with pytest.raises(Exception, match="Another server uses the folder"):
        serve(batch_settings(tmp_path))


def test_a_slow_upload_is_given_up(serve: Serve, tmp_path: Path) -> None:
    settings = batch_settings(tmp_path)
    running = serve(replace(settings, gateway=replace(settings.gateway, body_timeout_s=0.2)))
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        head = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n"
        connection.sendall(f"{head}content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
        assert b"408" in connection.recv(4096).split(b"\r\n")[0]
    wait_until(lambda: not list((tmp_path / "files").iterdir()), "what had arrived is removed")


def test_the_class_that_goes_behind_is_the_rank_policys(serve: Serve, tmp_path: Path) -> None:
    settings = batch_settings(tmp_path)
    options = {"prefix-group": {"batch_class": "bulk"}}
    running = serve(replace(settings, policies=replace(settings.policies, options=options)))
    run_batch(running.openai(), [line("a")])
    assert [request.slo_class for request in running.link.submitted] == ["bulk"]


def test_a_dead_engine_fails_no_line(serve: Serve, tmp_path: Path) -> None:
    """The batch waits for a server that can run it; what had been answered is kept."""
    link = FakeLink(step_s=0.003)
    first = serve(batch_settings(tmp_path, in_flight_max=2), link)
    client = first.openai()
    names = [f"r{index}" for index in range(60)]
    made = client.batches.create(
        input_file_id=upload(client, jsonl([line(name) for name in names])),
        endpoint=TEXT,
        completion_window="24h",
    )
    wait_until(lambda: client.batches.retrieve(made.id).request_counts.completed >= 3, "some are done")
    link.die()
    wait_until(lambda: first.http().get("/health").status_code == 503, "the server has noticed")
    assert client.batches.retrieve(made.id).status == "in_progress"
    first.stop()
    ended = wait_end(serve(batch_settings(tmp_path)).openai(), made.id)
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("completed", 60, 0)
