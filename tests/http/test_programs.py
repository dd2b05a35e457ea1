"""Programs over HTTP: what bodies, headers and answers say of them reaches the engine, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_link import FakeLink, make_info
from served import Running, start, wait_until

from penstock.gateway.tool_watch import WINDOW_CHARS, ToolWatch
from penstock.replica.messages import ProgramLeft, ToolCalled

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
CALL = b'Let me see. <tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>'


def pinning_link() -> FakeLink:
    policies = {"rank": "program-fcfs", "retain": "continuum"}
    return FakeLink(info=make_info(policies=policies), scripts={b"CALL": [*CALL]})


@pytest.fixture(scope="module")
def pinning() -> Iterator[Running]:
    running = start(link=pinning_link())
    yield running
    running.stop()


def last_request(running: Running) -> Any:
    return running.link.submitted[-1]


def test_the_body_tells_of_the_program(pinning: Running) -> None:
    client = pinning.openai()
    extra = {"program_id": "run-7", "tool": "shell", "pin_s": 4, "session_id": "s"}
    client.chat.completions.create(**BODY, extra_body=extra)
    request = last_request(pinning)
    assert (request.program_id, request.tool, request.pin_s, request.is_last_turn) == (
        "run-7",
        "shell",
        4.0,
        False,
    )
    assert request.program == ("default", "run-7") and request.session_id == "s"


def test_headers_tell_the_same(pinning: Running) -> None:
    headers = {
        "x-penstock-program-id": "run-8",
        "x-penstock-last-step": "true",
        "x-penstock-tool": "none of these",
    }
    answer = pinning.http().post(CHAT, json=BODY, headers=headers)
    assert answer.status_code == 200 and "x-penstock-ignored" not in answer.headers
    request = last_request(pinning)
    assert (request.program_id, request.is_last_turn, request.tool) == ("run-8", True, "none of these")


BAD: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"program_id": ""}, {}, "program_id"),
    ({"program_id": "x" * 257}, {}, "program_id"),
    ({"program_id": 5}, {}, "program_id"),
    ({"is_last_step": "yes"}, {}, "is_last_step"),
    ({"tool": "x" * 129}, {}, "tool"),
    ({"pin_s": -1, "program_id": "p"}, {}, "pin_s"),
    ({"pin_s": 1e9, "program_id": "p"}, {}, "pin_s"),
    ({"pin_s": 5}, {}, "pin_s"),
    ({"pin_s": 5, "program_id": "p", "is_last_step": True}, {}, "pin_s"),
    ({}, {"x-penstock-program-id": "x" * 257}, "x-penstock-program-id"),
    ({}, {"x-penstock-last-step": "maybe"}, "x-penstock-last-step"),
    ({}, {"x-penstock-tool": ""}, "x-penstock-tool"),
    ({"program_id": "p"}, {"x-penstock-pin-s": "nan"}, "x-penstock-pin-s"),
    ({"program_id": "p"}, {"x-penstock-pin-s": "1e999"}, "x-penstock-pin-s"),
    ({"program_id": "p"}, {"x-penstock-program-id": "q"}, "x-penstock-program-id"),
]


@pytest.mark.parametrize(("fields", "headers", "param"), BAD)
def test_what_is_wrong_is_named(
    pinning: Running, fields: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    answer = pinning.http().post(CHAT, json={**BODY, **fields}, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_server_that_pins_nothing_says_so(gateway: Running) -> None:
    answer = gateway.http().post(CHAT, json={**BODY, "program_id": "p", "pin_s": 5})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_parameter"
    assert gateway.http().delete("/v1/pins/p").status_code == 400
    assert gateway.http().post(CHAT, json={**BODY, "program_id": "p"}).status_code == 200


def test_a_client_lets_its_pin_go(pinning: Running) -> None:
    answer = pinning.http().delete("/v1/pins/org/run 9")
    assert answer.json() == {"id": "org/run 9", "object": "pin", "released": True}
    wait_until(
        lambda: ProgramLeft(("default", "org/run 9")) in pinning.link.advised, "the engine hears of it"
    )
    assert pinning.http().delete("/v1/pins/" + "x" * 300).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_is_read_from_the_answer(pinning: Running, stream: bool) -> None:
    body = {**BODY, "max_tokens": len(CALL), "messages": [{"role": "user", "content": "CALL"}]}
    pinning.link.advised.clear()
    pinning.http().post(CHAT, json={**body, "program_id": "p", "stream": stream})
    request = last_request(pinning)
    wait_until(lambda: ToolCalled(request.id, "search") in pinning.link.advised, "the engine hears of it")


def test_it_is_not_read_where_nobody_asked(pinning: Running) -> None:
    body = {**BODY, "max_tokens": len(CALL), "messages": [{"role": "user", "content": "CALL"}]}
    pinning.link.advised.clear()
    for fields in ({}, {"program_id": "p", "tool": "mine"}, {"program_id": "p", "is_last_step": True}):
        assert pinning.http().post(CHAT, json={**body, **fields}).status_code == 200
    pinning.wait_idle()
    assert pinning.link.advised == []


def test_pins_are_counted(serve: Callable[..., Running]) -> None:
    text = serve(link=pinning_link()).http().get("/metrics").text
    assert "penstock:kv_blocks_pinned" in text and "penstock:pins{" in text


# ---- the text alone -----------------------------------------------------------------------------------

CALLS = {
    '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>': "get_weather",
    "thinking … <function=run_tests><parameter=x>": "run_tests",
    '[TOOL_CALLS] [{"name": "find", "arguments": {}}]': "find",
    '<|python_tag|>{"type": "function", "name": "plot", "parameters": {}}': "plot",
    '{"name": "lookup", "parameters": {"a": 1}}': "lookup",
    "I will look.\n```bash\nls -la /tmp\n```": "ls",
    "Plain words, and a { brace.": None,
    'The user has {"name": "Ada", "age": 3}.': None,
    '<tool_call>{"name": "' + "x" * 65 + '"}': None,
}


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(("text", "tool"), CALLS.items())
def test_the_watch_reads_each_syntax(text: str, tool: str | None, piece: int) -> None:
    watch = ToolWatch()
    changes = sum(watch.feed(text[start : start + piece]) for start in range(0, len(text), piece))
    assert watch.tool == tool and changes == (tool is not None)


def test_the_last_call_counts_and_memory_is_bounded() -> None:
    watch = ToolWatch()
    assert watch.feed("<function=first>") and watch.tool == "first"
    for _ in range(50):
        assert not watch.feed("x" * 100)
    assert len(watch._tail) == WINDOW_CHARS
    assert watch.feed("<function=second>") and watch.tool == "second"
