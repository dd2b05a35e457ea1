"""Replay against a server that delays, refuses and cuts on demand, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from fake_openai import FakeServer, running

from penstock.core.errors import ConfigError, EnvironmentMissing, TraceError
from penstock.core.metrics import RequestOutcome, Slo
from penstock.core.reasons import FinishReason
from penstock.workloads.progress import NoProgress
from penstock.workloads.replay import ReplayOptions, ReplayRun, replay
from penstock.workloads.replay_report import report_of_run
from penstock.workloads.report import Report
from penstock.workloads.report_files import write_files
from penstock.workloads.shape import ShapeCounts
from penstock.workloads.target import Endpoint, find_target, open_client
from penstock.workloads.trace import TraceRow

OK, EVENTS = b"HTTP/1.1 200 OK\r\n", b"Content-Type: text/event-stream\r\n"


async def replay_rows(
    server: FakeServer,
    rows: Iterable[TraceRow],
    options: ReplayOptions | None = None,
    endpoint: Endpoint = "completions",
    stop: asyncio.Event | None = None,
) -> ReplayRun:
    options = options or ReplayOptions(timeout_s=20)
    async with open_client(server.url, None, options.concurrency_max + 8) as client:
        target = await find_target(client, server.url, None, endpoint)
        return await replay(rows, client, target, options, NoProgress(), stop or asyncio.Event())


def run_against(
    server: FakeServer,
    rows: Iterable[TraceRow],
    options: ReplayOptions | None = None,
    endpoint: Endpoint = "completions",
) -> ReplayRun:
    async def main() -> ReplayRun:
        async with running(server):
            return await replay_rows(server, rows, options, endpoint)

    return asyncio.run(main())


def evenly(count: int, gap_s: float, prompt_tokens: int = 12, output_tokens: int = 3) -> list[TraceRow]:
    return [TraceRow(index * gap_s, prompt_tokens, output_tokens) for index in range(count)]


def sent_outcomes(run: ReplayRun) -> tuple[list[RequestOutcome], list[float]]:
    return [exchange.outcome for exchange in run.exchanges], [exchange.sent_s for exchange in run.exchanges]


def report_of(run: ReplayRun, slo: Slo | None = None) -> Report:
    return report_of_run(
        run, title="t", slo=slo or Slo(60_000), warmup_s=0, shaping=ShapeCounts(), configuration={}
    )


def test_exact_lengths_are_asked_and_measured() -> None:
    server = FakeServer()
    rows = [TraceRow(0.0, 7, 3), TraceRow(0.0, 300, 1, "acme", "chat"), TraceRow(0.01, 1, 20, session_id="s")]
    run = run_against(server, rows)
    asked = sorted(server.seen, key=lambda seen: seen.headers["x-request-id"])
    for row, seen in zip(rows, asked, strict=True):
        body = seen.body
        assert len(body["prompt"]) == row.prompt_tokens
        assert body["max_tokens"] == body["min_tokens"] == row.output_tokens
        assert body["ignore_eos"] is True and body["stream_options"] == {"include_usage": True}
        assert body.get("session_id") == body.get("program_id") == row.session_id
    outcomes = {exchange.outcome.request_id: exchange.outcome for exchange in run.exchanges}
    assert [outcomes[f"replay-{i}"].output_tokens for i in range(3)] == [3, 1, 20]
    assert {outcome.finish for outcome in outcomes.values()} == {FinishReason.LENGTH}
    assert asked[1].headers["x-gateway-inference-fairness-id"] == "acme"
    client = report_of(run).client
    assert client and (client.prompt_length_mismatches, client.output_length_mismatches) == (0, 0)
    assert client.tokens_per_chunk == 1.0


def test_a_slow_server_does_not_delay_the_sends() -> None:
    # The server answers nobody until all are there: a client that waits for answers would never get one.
    server = FakeServer(hold_until_in_flight=20)
    rows = evenly(20, 0.02)
    run = run_against(server, rows)
    assert run.in_flight_max == 20 and run.cap_waits == 0
    assert all(exchange.outcome.is_answered for exchange in run.exchanges)
    assert max(seen.at_s for seen in server.seen) < min(server.ended_at_s.values())
    first = next(exchange for exchange in run.exchanges if exchange.asked is rows[0])
    assert first.outcome.ttft_s and first.outcome.ttft_s >= 19 * 0.02


def test_realised_rate_is_close_to_the_requested() -> None:
    run = run_against(FakeServer(), evenly(60, 0.02))
    report = report_of(run)
    assert report.rates.requested_rps == pytest.approx(50)
    assert report.rates.realised_rps and 50 / 4 < report.rates.realised_rps < 50 * 1.1
    assert all(exchange.sent_s >= exchange.outcome.arrival_s - 2e-3 for exchange in run.exchanges)


def test_ttft_counts_from_the_due_instant_when_the_cap_holds_back() -> None:
    run = run_against(FakeServer(delay_s=0.2), evenly(4, 0.0), ReplayOptions(concurrency_max=1, timeout_s=20))
    ttfts = sorted(exchange.outcome.ttft_s or 0.0 for exchange in run.exchanges)
    assert run.cap_waits == 3
    assert all(later - earlier >= 0.19 for earlier, later in pairwise(ttfts))
    assert "not open loop" in " ".join(report_of(run).notes)


def test_failed_rows_are_not_replayed() -> None:
    server = FakeServer()
    run = run_against(server, [TraceRow(0.0, 0, 0, failed=True), TraceRow(0.0, 5, 5)])
    assert len(server.seen) == len(run.exchanges) == 1


def test_lost_requests_are_misses_by_code() -> None:
    server = FakeServer(
        refuse=lambda number: {0: 503, 1: 500}.get(number),
        cut_after=lambda number: 1 if number == 2 else None,
    )
    report = report_of(run_against(server, evenly(5, 0.05)))
    assert (report.requests.answered, report.requests.lost) == (2, 3)
    assert report.requests.errors == {"overloaded": 2, "connection_lost": 1}
    assert (report.requests.by_outcome["refused"], report.requests.by_outcome["failed"]) == (1, 2)
    assert report.goodput.attained_frac == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (OK + b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", "not_a_stream"),
        (OK + EVENTS + b"Content-Length: 14\r\n\r\ndata: [DONE]\n\n", "stream_cut"),
        (OK + EVENTS + b"Content-Length: 9\r\n\r\ndata: {\n\n", "bad_stream"),
        (b"HTTP/1.1 418 X\r\nContent-Length: 4\r\n\r\nteap", "http_418"),
        (b"HTTP/1.1 999999 X\r\n\r\n", "connection_lost"),
        (b"", "connection_lost"),
        (OK + EVENTS + b"\r\n" + b"x" * (5 << 20), "bad_stream"),
    ],
)  # fmt: skip
def test_every_kind_of_bad_answer_has_a_code(raw: bytes, code: str) -> None:
    (exchange,) = run_against(FakeServer(raw_answer=raw), evenly(1, 0)).exchanges
    assert exchange.outcome.error_code == code
    assert not exchange.outcome.is_answered


def test_a_request_that_takes_too_long_is_given_up() -> None:
    run = run_against(FakeServer(delay_s=30), evenly(2, 0), ReplayOptions(timeout_s=0.3))
    assert {exchange.outcome.error_code for exchange in run.exchanges} == {"client_timeout"}


def test_short_answers_are_noticed() -> None:
    run = run_against(FakeServer(stop_at=2), evenly(3, 0, output_tokens=5))
    client = report_of(run).client
    assert client and client.output_length_mismatches == 3
    assert {exchange.outcome.finish for exchange in run.exchanges} == {FinishReason.STOP}


def test_the_stream_of_requests_is_a_function_of_the_seed() -> None:
    rows = [TraceRow(0.0, 50, 2), TraceRow(0.0, 60, 2, session_id="s"), TraceRow(0.01, 70, 2, session_id="s")]

    def bodies(seed: int) -> set[bytes]:
        server = FakeServer()
        run_against(server, rows, ReplayOptions(seed=seed, timeout_s=20))
        return {seen.raw for seen in server.seen}

    assert bodies(1) == bodies(1)
    assert not bodies(1) & bodies(2)


def test_closed_loop_turns_wait_for_answers_and_think_time() -> None:
    server = FakeServer(delay_s=0.3)
    rows = [
        TraceRow(0.0, 10, 2, session_id="a", elapsed_s=0.05),
        TraceRow(0.0, 10, 2),
        TraceRow(0.1, 12, 2, session_id="a", elapsed_s=0.05),
        TraceRow(0.1, 10, 2, session_id="b"),
        TraceRow(0.15, 14, 2, session_id="a"),
    ]
    run = run_against(server, rows, ReplayOptions(closed_loop=True, timeout_s=20))
    assert len(run.exchanges) == 5
    turns = sorted(
        (exchange for exchange in run.exchanges if exchange.asked.session_id == "a"),
        key=lambda exchange: exchange.outcome.arrival_s,
    )
    assert [exchange.asked.prompt_tokens for exchange in turns] == [10, 12, 14]
    for (earlier, later), think_s in zip(pairwise(turns), (0.05, 0.0), strict=True):
        assert later.outcome.arrival_s == pytest.approx(earlier.outcome.finish_s + think_s)
        assert later.sent_s >= earlier.outcome.finish_s + think_s - 1e-3
    prompts = [seen.body["prompt"] for seen in server.seen if seen.body.get("session_id") == "a"]
    assert prompts[1][:10] == prompts[0] and prompts[2][:12] == prompts[1]


def test_think_time_is_not_squeezed_by_the_rate_scale() -> None:
    rows = [TraceRow(0.0, 5, 1, session_id="a"), TraceRow(0.05, 6, 1, session_id="a")]
    run = run_against(FakeServer(), rows, ReplayOptions(closed_loop=True, rate_scale=10, timeout_s=20))
    first, second = run.exchanges
    assert second.outcome.arrival_s - first.outcome.finish_s == pytest.approx(0.5)


def test_stopping_gives_a_partial_report() -> None:
    async def main() -> ReplayRun:
        server = FakeServer(gap_s=0.05)
        async with running(server):
            stop = asyncio.Event()
            rows = [TraceRow(0.0, 5, 2), TraceRow(0.0, 5, 10_000), TraceRow(60.0, 5, 5)]
            task = asyncio.create_task(replay_rows(server, rows, stop=stop))
            while not server.ended_at_s:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            stop.set()
            return await task

    run = asyncio.run(main())
    report = report_of(run)
    assert run.interrupted and report.interrupted
    assert (report.requests.answered, report.requests.interrupted, report.requests.lost) == (1, 1, 0)


def test_a_trace_that_breaks_on_the_way_keeps_what_was_measured() -> None:
    def rows() -> Iterable[TraceRow]:
        yield TraceRow(0.0, 5, 2)
        yield TraceRow(0.0, 5, 2)
        raise TraceError("`t` line 3: broken.", hint="mend it")

    run = run_against(FakeServer(), rows())
    assert run.stopped_early == "`t` line 3: broken."
    with pytest.raises(TraceError):
        run_against(FakeServer(), failing())


def failing() -> Iterable[TraceRow]:
    yield from ()
    raise TraceError("`t` line 1: broken.", hint="mend it")


def words_of(text: str) -> int:
    """A tokenizer: every word is a token, words with an `x` are two; begin-of-text is one more."""
    return 1 + sum(2 if "x" in word else 1 for word in text.split(" "))


def test_chat_prompts_are_fitted_to_the_servers_tokenizer() -> None:
    server = FakeServer(tokenizer=words_of, chat_overhead=6)
    run = run_against(server, [TraceRow(0.0, length, 2) for length in (9, 40, 333)], endpoint="chat")
    assert run.text_fit and run.text_fit.is_exact and run.text_fit.overhead_tokens == 7
    assert not [word for word in run.text_fit.words if "x" in word]
    client = report_of(run).client
    assert client and client.prompt_length_mismatches == 0
    assert {exchange.outcome.prompt_tokens for exchange in run.exchanges} == {9, 40, 333}
    short = report_of(run_against(server, evenly(1, 0, prompt_tokens=7), endpoint="chat"))
    assert short.client and short.client.prompt_length_mismatches == 1
    assert "1 prompts are shorter than the chat template" in " ".join(short.notes)


def test_text_without_a_tokenizer_is_called_approximate() -> None:
    server = FakeServer()
    run = run_against(server, evenly(1, 0), ReplayOptions(text_prompts=True, timeout_s=20))
    assert isinstance(server.seen[0].body["prompt"], str)
    assert "approximate" in " ".join(report_of(run).notes)


def test_standard_fields_are_only_what_openai_defines() -> None:
    server = FakeServer()
    options = ReplayOptions(standard_fields=True, timeout_s=20)
    run_against(server, [TraceRow(0.0, 5, 2, session_id="s")], options, "chat")
    assert server.seen[0].body.keys() == {
        "model", "stream", "stream_options", "temperature", "messages", "max_completion_tokens",
    }  # fmt: skip


def test_server_metrics_are_sampled() -> None:
    metrics = (
        'vllm:num_requests_running{e="0"} 3\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 0.5\n'
    )
    run = run_against(FakeServer(metrics=metrics), evenly(2, 0.1))
    assert run.server and set(run.server.running) == {3} and set(run.server.kv_usage_frac) == {0.5}
    assert run_against(FakeServer(), evenly(1, 0)).server is None


def test_no_server_and_no_model() -> None:
    async def find(url: str, model: str | None) -> None:
        async with open_client(url, None, 4) as client:
            await find_target(client, url, model, "completions")

    async def main() -> None:
        async with running(FakeServer()) as server:
            await find(server.url, "fake")
            with pytest.raises(ConfigError, match="no model `other`"):
                await find(server.url, "other")
            url = server.url
        with pytest.raises(EnvironmentMissing, match="no server answers"):
            await find(url, None)

    asyncio.run(main())


def test_files_are_written(tmp_path: Path) -> None:
    run = run_against(FakeServer(), evenly(3, 0))
    write_files(report_of(run), *sent_outcomes(run), tmp_path / "deep" / "out")
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert names == {"report.json", "report.html", "requests.jsonl"}
    lines = (tmp_path / "deep" / "out" / "requests.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["output_tokens"] == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentMissing, match="cannot be written"):
        write_files(report_of(run), *sent_outcomes(run), tmp_path / "file")
