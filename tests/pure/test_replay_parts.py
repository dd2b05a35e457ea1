"""The replay's parts without a network: event parsing, reading of answers, server metrics, live totals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError
from penstock.core.metrics import RequestOutcome, Slo
from penstock.core.reasons import FinishReason
from penstock.workloads.exchange import StreamReading, error_code_of
from penstock.workloads.progress import LineProgress, facts
from penstock.workloads.server_metrics import ServerSeries, parse_metrics
from penstock.workloads.sse import EVENT_BYTES_MAX, EventTooLarge, SseParser
from penstock.workloads.tally import Tally
from penstock.workloads.target import base_url_of

STREAM = b': hello\n\ndata: {"a":1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_do_not_depend_on_how_bytes_arrive(cuts: list[int]) -> None:
    parser = SseParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = [event for a, b in zip(edges, edges[1:], strict=False) for event in parser.feed(STREAM[a:b])]
    assert found == [b'{"a":1}', b"two\nlines", b"[DONE]"]


@given(st.binary(max_size=200))
def test_the_parser_takes_any_bytes(data: bytes) -> None:
    assert all(isinstance(event, bytes) for event in SseParser().feed(data))


def test_an_endless_event_is_refused() -> None:
    parser = SseParser()
    with pytest.raises(EventTooLarge):
        for _ in range(3 + EVENT_BYTES_MAX // (1 << 20)):
            parser.feed(b"x" * (1 << 20))


def read(*messages: Any) -> StreamReading:
    reading = StreamReading()
    for index, message in enumerate(messages):
        payload = message if isinstance(message, bytes) else json.dumps(message).encode()
        reading.event(payload, float(index))
    return reading


def completion(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}]}


def chat(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": delta, "finish_reason": reason}]}


def test_a_completion_stream() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    found = read(
        completion("a"),
        completion(""),
        completion("c"),
        completion("", "length"),
        {"choices": [], "usage": usage},
    )
    assert (found.first_s, found.last_s, list(found.itl_s), found.chunks) == (0, 2, [1, 1], 3)
    assert (found.finish_reason, found.error_code) == ("length", None)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (9, 3, 4)


def test_a_chat_role_chunk_is_not_a_token() -> None:
    found = read(
        chat({"role": "assistant", "content": ""}), chat({"content": "hi"}), chat({}, "stop"), b"[DONE]"
    )
    assert (found.first_s, found.chunks, found.finish_reason) == (1, 1, "stop")


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"not json", "bad_stream"),
        (b"[" * 100_000, "bad_stream"),
        (b"[]", "bad_stream"),
        (b'{"error": {"message": "m", "code": "overloaded"}}', "overloaded"),
        (b'{"error": "text"}', "stream_error"),
    ],
)
def test_broken_events_become_error_codes(payload: bytes, code: str) -> None:
    assert read(payload).error_code == code


@given(
    st.recursive(
        st.none() | st.text() | st.integers() | st.floats(),
        lambda v: (
            st.lists(v)
            | st.dictionaries(
                st.sampled_from(
                    ["error", "code", "type", "choices", "usage", "text", "delta", "finish_reason", "content"]
                ),
                v,
            )
        ),
    )
)
def test_no_event_raises(message: Any) -> None:
    found = read(json.dumps(message).encode())
    assert found.error_code is None or found.error_code.isascii()


def test_error_codes_are_safe_to_print() -> None:
    assert error_code_of({"error": {"code": "\x1b[31m<b>x</b>" + "y" * 99}}, "z").startswith("31mbxby")
    assert len(error_code_of({"error": {"code": "y" * 999}}, "z")) == 48
    assert error_code_of({"error": {"code": None, "type": "server_error"}}, "z") == "server_error"
    assert error_code_of(["x"], "http_500") == "http_500"


def test_prometheus_text() -> None:
    text = """# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model="a}b"} 3.0
vllm:num_requests_running{engine="1"} 4
plain 7 1700000000
broken
nan_value NaN
"""
    assert parse_metrics(text) == {"vllm:num_requests_running": [3.0, 4.0], "plain": [7.0]}


def test_the_series_thins_itself() -> None:
    series = ServerSeries()
    for at in range(7):
        series.append(float(at), 1.0, None, 0.5)
    series.halve()
    assert series.t_s == [0, 2, 4, 6] and len(series.waiting) == 4


def outcome(ttft_s: float, finish: FinishReason = FinishReason.LENGTH) -> RequestOutcome:
    return RequestOutcome("r", 0.0, finish, 2.0, 1, 5, first_token_s=ttft_s, last_token_s=1.0)


def test_the_tally_and_its_line() -> None:
    tally = Tally(Slo(ttft_ms=300))
    for found in (outcome(0.1), outcome(0.5), outcome(0.2, FinishReason.FAILED)):
        tally.started()
        tally.ended(found)
    tally.started()
    tally.outputs = 100
    assert (tally.sent, tally.in_flight, tally.answered, tally.failed, tally.attained) == (4, 1, 2, 1, 1)
    written: list[str] = []
    progress = LineProgress(written.append)
    progress.update(tally, 1.0)
    assert not written, "the first line comes after five seconds"
    progress.update(tally, 6.0)
    progress.update(tally, 7.0)
    assert len(written) == 1 and "answered 2" in written[0] and "TTFT p50 200ms" in written[0]
    assert dict(facts(tally, 10.0))["goodput"] == "0.10/s"


@pytest.mark.parametrize("text", ["http://h:1/v1/", "http://h:1", "http://h:1/v1", "http://h:1/"])
def test_base_urls(text: str) -> None:
    assert base_url_of(text) == "http://h:1"


@pytest.mark.parametrize("text", ["", "h:1", "ftp://h", "http://", "http://h:99999", "http://[::1"])
def test_bad_base_urls(text: str) -> None:
    with pytest.raises(ConfigError, match="not an HTTP address"):
        base_url_of(text)
