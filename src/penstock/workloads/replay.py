"""Replay a trace against a live server: send on time, read the streams, measure both sides.

The loop here only sends and collects; `pacing` says when, `exchange` how one request goes, `prompts` what is
in it, and `report` what it all means.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from penstock.core.errors import TraceError
from penstock.core.metrics import Slo
from penstock.workloads.exchange import Exchange, PlannedRequest, Sender
from penstock.workloads.pacing import BodyMaker, ClosedLoop, OpenLoop, Pacer
from penstock.workloads.progress import Progress
from penstock.workloads.prompts import PromptMaker, TextFit, TokenRange
from penstock.workloads.server_metrics import MetricsSampler, ServerSeries
from penstock.workloads.tally import Tally
from penstock.workloads.target import Target, Tokenizer, fit_text
from penstock.workloads.trace import TraceRow

PROGRESS_EVERY_S = 0.25
EXCHANGES_MAX = 2_000_000  # about 1 KB each with 100 tokens of output


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """How to send. `text_prompts` sends text instead of token ids (always so for chat)."""

    seed: int = 0
    closed_loop: bool = False
    rate_scale: float = 1.0  # what the rows' arrivals were divided by already, for think times
    concurrency_max: int = 4096
    timeout_s: float = 600.0
    text_prompts: bool = False
    standard_fields: bool = False  # only what OpenAI defines: no ignore_eos, session_id, ...
    slo: Slo = Slo()  # for the live goodput


@dataclass(slots=True)
class ReplayRun:
    """What a replay measured. Times are seconds on the run's clock, which starts at the trace's second 0."""

    exchanges: list[Exchange] = field(default_factory=list)
    duration_s: float = 0.0
    in_flight_max: int = 0
    cap_waits: int = 0  # sends that had to wait for the in-flight cap
    unsent: int = 0  # due, but the run was interrupted before they left
    over_context: int = 0  # asked for more than the server's context
    interrupted: bool = False
    stopped_early: str | None = None  # why the trace was not sent to its end
    text_fit: TextFit | None = None  # None: prompts were token ids
    server: ServerSeries | None = None


async def replay(
    rows: Iterable[TraceRow],
    client: httpx.AsyncClient,
    target: Target,
    options: ReplayOptions,
    progress: Progress,
    stop: asyncio.Event,
) -> ReplayRun:
    """Send every row that did not fail in the trace; return when all have ended or `stop` is set.

    `rows` have their final times and lengths. A trace that breaks on the way ends the sending, and is said in
    `stopped_early`; a TraceError is raised only when nothing could be sent at all.
    """
    fit = None
    if options.text_prompts or target.endpoint == "chat":
        fit = await fit_text(Tokenizer(client, target))
    return await _Replay(rows, client, target, options, progress, fit).run(stop)


class _Replay:
    def __init__(
        self,
        rows: Iterable[TraceRow],
        client: httpx.AsyncClient,
        target: Target,
        options: ReplayOptions,
        progress: Progress,
        fit: TextFit | None,
    ) -> None:
        self._options = options
        self._progress = progress
        self._result = ReplayRun(text_fit=fit)
        self._tally = Tally(options.slo)
        self._slots = asyncio.Semaphore(options.concurrency_max)
        self._tasks: set[asyncio.Task[Exchange]] = set()
        self._bug: BaseException | None = None
        self._origin_s = time.perf_counter()
        self._context_len = target.context_len
        self._make_body = body_maker(target, options, fit)
        self._pacer = self._choose_pacer(row for row in rows if not row.failed)
        self._sender = Sender(client, target, self.now_s, options.timeout_s, self._count_outputs)
        self._sampler = MetricsSampler(client, target.base_url, self.now_s)

    def now_s(self) -> float:
        return time.perf_counter() - self._origin_s

    def _choose_pacer(self, rows: Iterator[TraceRow]) -> Pacer:
        if self._options.closed_loop:
            return ClosedLoop(rows, self._make_body, self.now_s, self._options.rate_scale)
        return OpenLoop(rows, self._make_body, self.now_s)

    async def run(self, stop: asyncio.Event) -> ReplayRun:
        await self._sampler.sample()
        helpers = [asyncio.create_task(self._sampler.run()), asyncio.create_task(self._show())]
        self._origin_s = time.perf_counter()  # loading and the first sample are not part of the run
        try:
            with self._progress:
                await self._run_until(stop)
        finally:
            for task in (*helpers, *self._tasks):
                task.cancel()
            await asyncio.gather(*helpers, *self._tasks, return_exceptions=True)
        self._result.duration_s = self.now_s()
        await self._sampler.sample()
        series = self._sampler.series
        self._result.server = series if series.t_s else None
        self._result.in_flight_max = self._tally.in_flight_max
        return self._result

    async def _run_until(self, stop: asyncio.Event) -> None:
        """Send everything and wait for the answers; `stop` cuts both short."""
        sending = asyncio.create_task(self._send_all())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            while self._tasks and not stop.is_set() and self._bug is None:
                await asyncio.wait({stopping, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            self._result.interrupted = stop.is_set()
        finally:
            stopping.cancel()
            sending.cancel()
            for task in self._tasks:
                task.cancel()
            # `_collect` runs for each in-flight request before this returns
            await asyncio.gather(sending, stopping, *self._tasks, return_exceptions=True)
        error = self._bug or (None if sending.cancelled() else sending.exception())
        if error is not None:
            raise error

    async def _send_all(self) -> None:
        try:
            while (planned := await self._pacer.next()) is not None:
                if self._tally.sent >= EXCHANGES_MAX:
                    self._result.stopped_early = f"it reached {EXCHANGES_MAX} requests"
                    break
                if self._slots.locked():
                    self._result.cap_waits += 1
                await self._slots.acquire()
                self._send(planned)
        except TraceError as error:
            if not self._tally.sent:
                raise
            self._result.stopped_early = error.message

    def _send(self, planned: PlannedRequest) -> None:
        row = planned.row
        if self._context_len is not None and row.prompt_tokens + row.output_tokens > self._context_len:
            self._result.over_context += 1
        self._tally.started()
        task = asyncio.create_task(self._sender.send(planned))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._collect(planned, done))

    def _collect(self, planned: PlannedRequest, task: asyncio.Task[Exchange]) -> None:
        self._tasks.discard(task)
        self._slots.release()
        if task.cancelled():  # before its first step: nothing was sent
            self._result.unsent += 1
            self._tally.in_flight -= 1
            return
        if error := task.exception():  # `send` never raises, so this is a bug of ours: end the run with it
            self._bug = error
            return
        exchange = task.result()
        self._result.exchanges.append(exchange)
        self._tally.ended(exchange.outcome)
        self._pacer.finished(planned, exchange.outcome.finish_s)

    def _count_outputs(self, count: int) -> None:
        self._tally.outputs += count

    async def _show(self) -> None:
        while True:
            self._progress.update(self._tally, self.now_s())
            await asyncio.sleep(PROGRESS_EVERY_S)


def body_maker(target: Target, options: ReplayOptions, fit: TextFit | None) -> BodyMaker:
    """A function from (index, row) to the bytes to post; the same seed makes the same bytes."""
    prompts = PromptMaker(options.seed, TokenRange.of_vocabulary(target.vocab_size))
    fields = _fields_of_chat if target.endpoint == "chat" else _fields_of_completion

    def make_body(index: int, row: TraceRow) -> bytes:
        content = prompts.token_ids(index, row) if fit is None else prompts.text(index, row, fit)
        body: dict[str, Any] = {
            "model": target.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
        body |= fields(content, row, options.standard_fields)
        if not options.standard_fields:
            body |= {"min_tokens": row.output_tokens, "ignore_eos": True}
            if row.session_id is not None:  # a session is one program's, as the twin has it
                body |= {"session_id": row.session_id, "program_id": row.session_id}
        return json.dumps(body, separators=(",", ":")).encode()

    return make_body


def _fields_of_completion(content: list[int] | str, row: TraceRow, standard: bool) -> dict[str, Any]:
    return {"prompt": content, "max_tokens": row.output_tokens}


def _fields_of_chat(content: list[int] | str, row: TraceRow, standard: bool) -> dict[str, Any]:
    limit = "max_completion_tokens" if standard else "max_tokens"
    return {"messages": [{"role": "user", "content": content}], limit: row.output_tokens}
