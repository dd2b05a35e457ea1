"""Whatever is sent: a clear error that names the field, and a server that serves the next request."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from fake_link import FakeLink, make_info
from served import WAIT_S, Running, make_settings

CHAT, LEGACY = "/v1/chat/completions", "/v1/completions"
GOOD_CHAT: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 2,
}
GOOD_LEGACY: dict[str, Any] = {"model": "fake", "prompt": "hi", "max_tokens": 2}


def user(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


UNSUPPORTED = "unsupported_parameter"
TOO_LONG = "context_length_exceeded"

# (path, fields to change, param named, code)
FIELDS: list[tuple[str, dict[str, Any], str | None, str | None]] = [
    (CHAT, {"model": None}, "model", None),
    (CHAT, {"model": 5}, "model", None),
    (CHAT, {"model": "gpt-9"}, "model", "model_not_found"),
    (CHAT, {"messages": None}, "messages", None),
    (CHAT, {"messages": []}, "messages", None),
    (CHAT, {"messages": "hi"}, "messages", None),
    (CHAT, {"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", None),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", None),
    (CHAT, {"messages": user(None)}, "messages[0].content", None),
    (CHAT, {"messages": user([{"type": "text"}])}, "messages[0].content[0].text", None),
    (CHAT, {"messages": user([{"type": "image_url"}])}, "messages[0].content[0].type", UNSUPPORTED),
    (CHAT, {"messages": user([{"type": "input_audio"}])}, "messages[0].content[0].type", UNSUPPORTED),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", UNSUPPORTED),
    (CHAT, {"messages": user("x", tool_calls=[{}])}, "messages[0].tool_calls", UNSUPPORTED),
    (CHAT, {"messages": user("x") * 5000}, "messages", None),
    (CHAT, {"messages": user("x" * 5000)}, "messages", TOO_LONG),
    (CHAT, {"max_tokens": 0}, "max_tokens", None),
    (CHAT, {"max_tokens": -1}, "max_tokens", None),
    (CHAT, {"max_tokens": "9"}, "max_tokens", None),
    (CHAT, {"max_tokens": 1.5}, "max_tokens", None),
    (CHAT, {"max_tokens": True}, "max_tokens", None),
    (CHAT, {"max_tokens": 10**30}, "max_tokens", None),
    (CHAT, {"max_tokens": 4096}, "max_tokens", TOO_LONG),
    (CHAT, {"max_completion_tokens": 4096}, "max_completion_tokens", TOO_LONG),
    (CHAT, {"n": 0}, "n", None),
    (CHAT, {"n": 17}, "n", None),
    (CHAT, {"n": 1000}, "n", None),
    (CHAT, {"temperature": -0.1}, "temperature", None),
    (CHAT, {"temperature": 2.1}, "temperature", None),
    (CHAT, {"temperature": "1"}, "temperature", None),
    (CHAT, {"top_p": 0}, "top_p", None),
    (CHAT, {"top_p": 1.1}, "top_p", None),
    (CHAT, {"presence_penalty": 2.5}, "presence_penalty", None),
    (CHAT, {"frequency_penalty": -2.5}, "frequency_penalty", None),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty", None),
    (CHAT, {"top_k": -2}, "top_k", None),
    (CHAT, {"min_p": 1.5}, "min_p", None),
    (CHAT, {"seed": 2**70}, "seed", None),
    (CHAT, {"stop": ""}, "stop", None),
    (CHAT, {"stop": [""]}, "stop", None),
    (CHAT, {"stop": [1]}, "stop", None),
    (CHAT, {"stop": ["x"] * 5}, "stop", None),
    (CHAT, {"stop": ["x"] * 100_000}, "stop", None),
    (CHAT, {"stop": "x" * 1000}, "stop", None),
    (CHAT, {"logit_bias": [1]}, "logit_bias", None),
    (CHAT, {"logit_bias": {"a": 1}}, "logit_bias", None),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias", None),
    (CHAT, {"logit_bias": {"1": True}}, "logit_bias", None),
    (CHAT, {"logit_bias": {"9999": 1}}, "logit_bias", None),
    (CHAT, {"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias", None),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", None),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", None),
    (CHAT, {"logprobs": 1}, "logprobs", None),
    (CHAT, {"stream": "yes"}, "stream", None),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", None),
    (CHAT, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", None),
    (CHAT, {"stop_token_ids": [300]}, "stop_token_ids", None),
    (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids[0]", None),
    (CHAT, {"min_tokens": 3}, "min_tokens", None),
    (CHAT, {"priority": 1}, "priority", UNSUPPORTED),
    (CHAT, {"cache_salt": ""}, "cache_salt", None),
    (CHAT, {"session_id": ""}, "session_id", None),
    (CHAT, {"tools": [{}]}, "tools", UNSUPPORTED),
    (CHAT, {"tool_choice": "required"}, "tool_choice", UNSUPPORTED),
    (CHAT, {"functions": [{}]}, "functions", UNSUPPORTED),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", UNSUPPORTED),
    (CHAT, {"modalities": ["audio"]}, "modalities", UNSUPPORTED),
    (CHAT, {"audio": {"voice": "x"}}, "audio", UNSUPPORTED),
    (CHAT, {"guided_json": {"type": "object"}}, "guided_json", UNSUPPORTED),
    (LEGACY, {"prompt": None}, "prompt", None),
    (LEGACY, {"prompt": ""}, "prompt", None),
    (LEGACY, {"prompt": []}, "prompt", None),
    (LEGACY, {"prompt": [[]]}, "prompt", None),
    (LEGACY, {"prompt": ["a", 1]}, "prompt", None),
    (LEGACY, {"prompt": [1, "a"]}, "prompt", None),
    (LEGACY, {"prompt": [True]}, "prompt", None),
    (LEGACY, {"prompt": [300]}, "prompt", None),
    (LEGACY, {"prompt": [-1]}, "prompt", None),
    (LEGACY, {"prompt": [10**25]}, "prompt", None),
    (LEGACY, {"prompt": ["a"] * 129}, "prompt", None),
    (LEGACY, {"prompt": [1] * 5000}, "prompt", TOO_LONG),
    (LEGACY, {"logprobs": 21}, "logprobs", None),
    (LEGACY, {"logprobs": True}, "logprobs", None),
    (LEGACY, {"echo": 1}, "echo", None),
    (LEGACY, {"suffix": "end"}, "suffix", UNSUPPORTED),
    (LEGACY, {"best_of": 2}, "best_of", UNSUPPORTED),
    (LEGACY, {"prompt": ["a"] * 100, "stop": ["x" * 400] * 4}, "stop", None),
]


def assert_error(answer: Any, status: int, param: str | None, code: str | None) -> None:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert isinstance(error["message"], str) and error["message"]
    assert answer.headers["x-request-id"] and answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("path", "change", "param", "code"), FIELDS, ids=lambda each: json.dumps(each)[:50])
def test_a_bad_field_is_named(
    gateway: Running, path: str, change: dict[str, Any], param: str | None, code: str | None
) -> None:
    good = GOOD_CHAT if path == CHAT else GOOD_LEGACY
    answer = gateway.http().post(path, json={**good, **change})
    assert_error(answer, 404 if code == "model_not_found" else 400, param, code)
    assert gateway.http().post(path, json=good).status_code == 200
    gateway.wait_idle()


BODIES: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"null", 400),
    (b"[]", 400),
    (b'"text"', 400),
    (b"[" * 100_000, 400),
    (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 400),
    (b'{"model":"fake","temperature":NaN}', 400),
    (b'{"model":"fake","temperature":1e999}', 400),
    (b'{"model":"fake","messages":[{"role":"user","content":"\\ud800"}]}', 400),
    (b"\xff\xfe{}", 400),
    (b'{"model":"fake"', 400),
    (b" " * (9 << 20), 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=lambda each: repr(each)[:30])
def test_a_malformed_body_is_refused(gateway: Running, body: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = gateway.http().post(CHAT, content=body, headers=headers)
    assert_error(answer, status, None, "payload_too_large" if status == 413 else None)


def test_a_body_that_grows_beyond_the_limit_is_cut_while_it_is_read(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"body_bytes_max": 100_000}))

    def chunks() -> Any:
        for _ in range(64):
            yield b" " * 4096

    answer = running.http().post(CHAT, content=chunks(), headers={"content-type": "application/json"})
    assert_error(answer, 413, None, "payload_too_large")
    assert running.app.state.gateway.budget.bytes_held == 0


def test_a_body_that_never_comes_times_out(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"body_timeout_s": 0.2}))
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_headers_that_never_end_are_refused(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"header_bytes_max": 4096, "header_timeout_s": 0.5}))
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):  # the server answers and closes; writing on then fails
            for _ in range(10_000):
                sock.sendall(b"X-Filler: " + b"x" * 1000 + b"\r\n")
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert sock.recv(65536) == b"", "closed when the headers' time is up"
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as sock:
        sock.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        answer = sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'"invalid_request_error"' in answer
    assert running.http().get("/health").status_code == 200


def test_a_form_is_not_json(gateway: Running) -> None:
    answer = gateway.http().post(CHAT, data={"model": "fake"})
    assert_error(answer, 415, None, "unsupported_media_type")


def test_odd_but_legal_bodies_are_served(gateway: Running) -> None:
    """NUL characters, a key given twice (the last counts), null for what may be absent, no content type."""
    nul = {**GOOD_CHAT, "messages": user("a\x00b"), "stop": "\x00", "temperature": None, "n": None}
    assert gateway.http().post(CHAT, json=nul).status_code == 200
    twice = b'{"model":"x","model":"fake","prompt":"hi","max_tokens":1}'
    assert gateway.http().post(LEGACY, content=twice).status_code == 200
    parts = user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "best_of": 1}
    answer = gateway.http().post(CHAT, json={**GOOD_CHAT, "messages": parts, **neutral})
    assert answer.status_code == 200 and "x-penstock-ignored" not in answer.headers


def test_unknown_fields_are_ignored_and_listed(gateway: Running) -> None:
    odd = {"colour": 1, "x\r\ny": 2, "user": "u", "stream_options": {"inkl": 1}, "stream": True}
    answer = gateway.http().post(CHAT, json={**GOOD_CHAT, **odd})
    assert answer.status_code == 200
    assert answer.headers["x-penstock-ignored"] == "colour, x??y, stream_options.inkl"


def test_unknown_fields_are_refused_in_strict_mode(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"strict_fields": True}))
    answer = running.http().post(CHAT, json={**GOOD_CHAT, "colour": 1})
    assert_error(answer, 400, "colour", None)
    assert running.http().post(CHAT, json={**GOOD_CHAT, "user": "u"}).status_code == 200


def test_what_the_kv_pool_can_never_hold_is_refused(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(info=make_info(kv_blocks=4)))
    over = running.http().post(CHAT, json={**GOOD_CHAT, "max_tokens": 100})
    assert_error(over, 400, "max_tokens", "request_exceeds_capacity")
    long = running.http().post(CHAT, json={**GOOD_CHAT, "messages": user("x" * 100)})
    assert_error(long, 400, "messages", "request_exceeds_capacity")
    filled = running.http().post(CHAT, json={"model": "fake", "messages": user("hi")})
    assert filled.json()["usage"]["total_tokens"] == 65, "absent max_tokens fills the pool: 64 tokens and one"


def test_tokenize_wants_one_of_two(gateway: Running) -> None:
    assert_error(gateway.http().post("/tokenize", json={}), 400, "prompt", None)
    both = {"prompt": "x", "messages": user("x")}
    assert_error(gateway.http().post("/tokenize", json=both), 400, "prompt", None)
    assert_error(gateway.http().post("/detokenize", json={"tokens": [999]}), 400, "tokens", None)
    assert_error(gateway.http().post("/detokenize", json={"tokens": ["a"]}), 400, "tokens[0]", None)
    huge = gateway.http().post("/detokenize", json={"tokens": ["a"] * 500_000})
    assert_error(huge, 400, "tokens[0]", None)


def test_tokens_go_round(gateway: Running) -> None:
    text = "Grüße, 世界 " * 2000  # long enough to be encoded beside the event loop
    tokens = gateway.http().post("/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 4096
    assert gateway.http().post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = gateway.http().post("/tokenize", json={"messages": user("hi"), "return_token_strs": True}).json()
    assert "".join(chat["token_strs"]) == "user: hi\nassistant: "


@pytest.mark.parametrize(
    ("given", "echoed"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)],
)
def test_a_safe_request_id_is_echoed(gateway: Running, given: str, echoed: bool) -> None:
    answer = gateway.http().get("/version", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is echoed
    refused = gateway.http().post(CHAT, json={}, headers={"x-request-id": given})
    assert (refused.headers["x-request-id"] == given) is echoed


def test_unknown_paths_and_methods(gateway: Running) -> None:
    assert_error(gateway.http().get("/v2/nothing"), 404, None, "not_found")
    wrong = gateway.http().delete(CHAT)
    assert_error(wrong, 405, None, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert_error(gateway.http().get("/v1/models/other"), 404, "model", "model_not_found")


@pytest.mark.parametrize("value", ["0", "-5", "x", "1e3", "999999999999"])
def test_a_bad_deadline_is_refused(gateway: Running, value: str) -> None:
    answer = gateway.http().post(CHAT, json=GOOD_CHAT, headers={"x-penstock-deadline-ms": value})
    assert_error(answer, 400, "x-penstock-deadline-ms", None)


def test_an_undefined_class_is_refused(gateway: Running) -> None:
    answer = gateway.http().post(CHAT, json=GOOD_CHAT, headers={"x-penstock-class": "gold"})
    assert_error(answer, 400, "x-penstock-class", None)


def test_a_bug_of_ours_is_a_500_with_the_id_and_no_trace(serve: Callable[..., Running]) -> None:
    running = serve()
    running.app.state.gateway.template = None  # every chat now trips over it
    answer = running.http().post(CHAT, json=GOOD_CHAT, headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert "find-me" in error["message"] and "Traceback" not in answer.text and "NoneType" not in answer.text
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert running.http().post(LEGACY, json=GOOD_LEGACY).status_code == 200
    running.wait_idle()


def test_a_request_that_fails_in_the_engine_is_a_500(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(fail_on=b"boom"))
    answer = running.http().post(CHAT, json={**GOOD_CHAT, "messages": user("boom"), "n": 2})
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert running.http().post(CHAT, json=GOOD_CHAT).status_code == 200
    running.wait_idle()


def test_too_many_bytes_of_bodies_are_shed(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"bodies_bytes_max": 2048}))
    answer = running.http().post(LEGACY, json={**GOOD_LEGACY, "prompt": "x" * 3000})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "overloaded"
    assert running.http().post(LEGACY, json=GOOD_LEGACY).status_code == 200
    assert running.app.state.gateway.budget.bytes_held == 0


def test_a_callers_own_limit_is_429(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(desk={"tenant_requests_max": 2}), FakeLink(step_s=0.01))
    with running.http().stream("POST", CHAT, json={**GOOD_CHAT, "max_tokens": 2000, "stream": True}):
        answer = running.http().post(CHAT, json={**GOOD_CHAT, "n": 2})
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "concurrency_limit_exceeded"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1 and answer.headers["x-should-retry"] == "true"
    never = running.http().post(CHAT, json={**GOOD_CHAT, "n": 3})
    assert_error(never, 400, "n", "request_exceeds_capacity")
    running.wait_idle()
