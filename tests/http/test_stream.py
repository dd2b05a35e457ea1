"""The bytes of a stream, and that a stream says exactly what the whole answer says."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_link import FakeLink
from fakes import EOS
from served import WAIT_S, Running, make_settings, start

from penstock.core.reasons import CancelReason
from penstock.gateway.schema_out import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk

CHAT, LEGACY = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


def events_of(text: str) -> list[dict[str, Any]]:
    """The parsed `data:` events before `[DONE]`, which must be the last."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def stream_of(running: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = running.http().post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    return events_of(answer.text)


def test_the_bytes_on_the_wire(gateway: Running) -> None:
    """What `curl -N` would show: headers at once, one event a line pair, `[DONE]`, and the chunked end."""
    body = json.dumps({**HELLO, "max_tokens": 2, "stream": True}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=WAIT_S) as sock:
        sock.sendall(head % CHAT.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        raw = b"".join(iter(lambda: sock.recv(65536), b""))
    headers, _, chunked = raw.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 OK")
    lowered = headers.lower()
    for expected in (
        b"content-type: text/event-stream",
        b"cache-control: no-cache",
        b"x-accel-buffering: no",
        b"x-request-id: ",
        b"x-penstock-queue-ms: ",
        b"x-penstock-cached-tokens: ",
        b"openai-processing-ms: ",
    ):
        assert expected in lowered
    assert chunked.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"\n\n" in chunked and b"\r\ndata" in chunked


def test_the_shape_of_a_chat_stream(gateway: Running) -> None:
    events = stream_of(gateway, CHAT, {**HELLO, "max_tokens": 3})
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {} and events[-1]["choices"][0]["finish_reason"] == "length"
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert all("usage" not in event for event in events), "no usage unless asked for"


def test_usage_is_null_in_every_chunk_but_the_last(gateway: Running) -> None:
    asked = {**HELLO, "max_tokens": 3, "n": 2, "stream_options": {"include_usage": True}}
    events = stream_of(gateway, CHAT, asked)
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 6
    assert sum(not event["choices"] for event in events) == 1, "one usage chunk for all choices"


def scores_of(choice: dict[str, Any]) -> list[Any]:
    """One entry a token, of either wire form."""
    scores = choice["logprobs"]
    if not scores:
        return []
    if "content" in scores:
        return list(scores["content"])
    columns = (scores[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))
    return list(zip(*columns, strict=True))


def fold_chat(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    folded: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            whole = folded.setdefault(
                choice["index"], {"text": "", "scored": [], "finish": None, "stop": None}
            )
            whole["text"] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            whole["scored"] += scores_of(choice)
            if choice["finish_reason"] is not None:
                assert whole["finish"] is None, "one finish a choice"
                whole["finish"], whole["stop"] = choice["finish_reason"], choice["stop_reason"]
    return folded


def whole_of(answer: dict[str, Any]) -> dict[int, dict[str, Any]]:
    folded = {}
    for choice in answer["choices"]:
        folded[choice["index"]] = {
            "text": choice["message"]["content"] if "message" in choice else choice["text"],
            "scored": scores_of(choice),
            "finish": choice["finish_reason"],
            "stop": choice["stop_reason"],
        }
    return folded


SCRIPTS = {
    b"euro": list("5 € and ünï".encode()),
    b"eos": [*b"done", EOS],
    b"stopper": list(b"one two three four"),
    b"broken": [*b"ab", 0xE2, 0x82],
}
CASES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {**HELLO, "max_tokens": 7}),
    (CHAT, {**HELLO, "max_tokens": 7, "n": 3, "temperature": 1, "seed": 5}),
    (CHAT, {**HELLO, "max_tokens": 7, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "euro"}]}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "eos"}], "logprobs": True}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "eos"}], "ignore_eos": True}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "stopper"}], "stop": "wo t"}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "stopper"}], "stop": ["zzz", "r f", "four"]}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "stopper"}], "stop": "our!"}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "stopper"}], "stop_token_ids": [119]}),
    (CHAT, {**HELLO, "messages": [{"role": "user", "content": "broken"}]}),
    (LEGACY, {"model": "fake", "prompt": "hello", "max_tokens": 4, "temperature": 0}),
    (LEGACY, {"model": "fake", "prompt": ["a", "bc"], "n": 2, "seed": 3, "echo": True, "logprobs": 1}),
    (LEGACY, {"model": "fake", "prompt": [[104, 105], [106]], "echo": True, "max_tokens": 2, "seed": 1}),
    (LEGACY, {"model": "fake", "prompt": "stopper", "stop": "two", "logprobs": 0, "temperature": 0}),
]


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    running = start(link=FakeLink(scripts=SCRIPTS))
    yield running
    running.stop()


@pytest.mark.parametrize(("path", "body"), CASES, ids=lambda each: json.dumps(each)[:60])
def test_a_stream_says_what_the_whole_answer_says(scripted: Running, path: str, body: dict[str, Any]) -> None:
    whole = scripted.http().post(path, json=body)
    assert whole.status_code == 200, whole.text
    options = {"stream_options": {"include_usage": True}}
    events = stream_of(scripted, path, {**body, **options})
    assert fold_chat(events) == whole_of(whole.json())
    assert events[-1]["usage"] == whole.json()["usage"]
    (ChatCompletion if path == CHAT else Completion).model_validate_json(whole.text)
    for event in events:
        (ChatCompletionChunk if path == CHAT else CompletionChunk).model_validate(event)
    scripted.wait_idle()


def ask(running: Running, content: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    answer = running.http().post(CHAT, json={**HELLO, "messages": messages, **options})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert isinstance(choice, dict)
    return {**choice, "usage": answer.json()["usage"]}


def test_a_stop_string_is_never_returned_and_ends_the_work(scripted: Running) -> None:
    choice = ask(scripted, "stopper", stop=["e t"])
    assert (choice["message"]["content"], choice["finish_reason"]) == ("on", "stop")
    assert choice["stop_reason"] == "e t"
    scripted.wait_idle()
    assert scripted.link.cancels[-1][1] is CancelReason.STOP_STRING


def test_a_stop_token_is_counted_but_is_no_text(scripted: Running) -> None:
    choice = ask(scripted, "eos")
    assert (choice["message"]["content"], choice["finish_reason"]) == ("done", "stop")
    assert choice["stop_reason"] is None and choice["usage"]["completion_tokens"] == 5
    named = ask(scripted, "stopper", stop_token_ids=[ord("w")])
    assert (named["message"]["content"], named["stop_reason"]) == ("one t", ord("w"))


def test_characters_are_never_split(scripted: Running) -> None:
    messages = [{"role": "user", "content": "euro"}]
    events = stream_of(scripted, CHAT, {**HELLO, "messages": messages})
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == "5 € and ünï" and "\ufffd" not in "".join(pieces)
    assert "€" in pieces


def test_a_silent_stream_is_kept_alive(serve: Callable[..., Running]) -> None:
    """Queued for longer than the keep-alive: the stream begins with comments, then the text comes."""
    running = serve(make_settings(gateway={"keepalive_s": 0.1}))
    running.link.freeze()
    with running.http().stream("POST", CHAT, json={**HELLO, "max_tokens": 2, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": keep-alive"
        assert "x-penstock-queue-ms" not in answer.headers, "not known when the headers left"
        running.link.thaw()
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and len(rest) == 5
