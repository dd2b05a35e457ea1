"""Runs the batches of a store, one after the other, in the background of everything else.

    validating ─► in_progress ─► finalizing ─► completed
        │              ├─ completion window over ─► expired
        └─ failed      └─ cancelling ─► cancelled

A batch that a restart interrupted goes on where it was: lines that have a result are not run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import IO, Final

from penstock.core.errors import Draining, NoHealthyEngine
from penstock.gateway.batches.job import Job
from penstock.gateway.batches.lines import JobFile, JobLine, LineResult, done_ids, read_job
from penstock.gateway.batches.records import BatchRecord, Problem, Status
from penstock.gateway.batches.store import ERRORS, OUTPUT, BatchStore
from penstock.gateway.state import Gateway

logger = logging.getLogger(__name__)

INTERRUPTED_RETRY_S: Final = 5.0
_ENDED_EARLY: Final = {
    Status.EXPIRED: ("batch_expired", "The batch's completion window was over before this request ran."),
    Status.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request ran."),
}


class BatchWorker:
    """One task on the event loop."""

    def __init__(self, gateway: Gateway, store: BatchStore, wall_clock: Callable[[], float]) -> None:
        self._gateway = gateway
        self._store = store
        self._wall_clock = wall_clock
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._current: tuple[BatchRecord, asyncio.Task[None]] | None = None

    def start(self) -> None:
        """Begin, with what an earlier server left unfinished."""
        self._loop_task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Leave everything as it is; the next server goes on."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        self._store.close()

    def added(self) -> None:
        """There is a new batch in the store."""
        self._wake.set()

    def cancel(self, batch: BatchRecord) -> None:
        """Stop a batch that has not ended; its results so far are kept."""
        self._enter(batch, Status.CANCELLING)
        if self._current is not None and self._current[0] is batch:
            self._current[1].cancel()
        self._wake.set()

    # ---- the loop -------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            batch = next((each for each in self._store.batches.values() if not each.status.is_end), None)
            if batch is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                if self._wall_clock() < batch.expires_s:
                    self._gateway.switchboard.check_ready()
                await self._run(batch)
            except (Draining, NoHealthyEngine) as error:
                logger.warning("batch %s waits: %s", batch.id, error.message)
                await asyncio.sleep(INTERRUPTED_RETRY_S)
            except OSError as error:  # the disk is full, or the folder is gone: it may be mended
                logger.error("batch %s waits: %s", batch.id, error)
                await asyncio.sleep(INTERRUPTED_RETRY_S)
            except Exception:  # a bug of ours must not stop the other batches
                logger.exception("batch %s failed", batch.id)
                batch.problems = [Problem("internal_error", "The server failed to run this batch.")]
                with contextlib.suppress(OSError):
                    self._enter(batch, Status.FAILED)

    async def _run(self, batch: BatchRecord) -> None:
        """To its end, whichever it is."""
        if _is_cancelling(batch):
            await self._end_early(batch, Status.CANCELLED)
            return
        task = asyncio.create_task(self._advance(batch))
        self._current = (batch, task)
        try:
            async with asyncio.timeout(max(0.0, batch.expires_s - self._wall_clock())):
                await task
        except TimeoutError:
            await self._end_early(batch, Status.EXPIRED)
        except asyncio.CancelledError:
            if not _is_cancelling(batch):
                raise  # the server stops
            await self._end_early(batch, Status.CANCELLED)
        finally:
            self._current = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _advance(self, batch: BatchRecord) -> None:
        if batch.status is not Status.FINALIZING:
            file = await self._read(batch)
            if file.problems:
                batch.problems = file.problems
                self._enter(batch, Status.FAILED)
                return
            batch.total = len(file.lines)
            if batch.status is Status.VALIDATING:
                self._enter(batch, Status.IN_PROGRESS)
            await self._run_lines(batch, file)
            self._enter(batch, Status.FINALIZING)
        self._store.keep_results(batch)
        self._enter(batch, Status.COMPLETED)

    async def _run_lines(self, batch: BatchRecord, file: JobFile) -> None:
        with ExitStack() as stack:
            results = await asyncio.to_thread(_Results, self._store, batch, stack)
            left = results.left(file.lines)
            job = Job(
                self._gateway,
                file,
                left,
                name=batch.id,
                tenant=batch.tenant,
                in_flight_max=self._gateway.settings.batch.in_flight_max,
                is_background=True,
                on_result=results.take,
            )
            await job.prepare()
            await job.run()

    async def _end_early(self, batch: BatchRecord, status: Status) -> None:
        """Say of every line without a result why it has none; what is there is kept."""
        file = await self._read(batch)
        with ExitStack() as stack:
            results = await asyncio.to_thread(_Results, self._store, batch, stack)
            await asyncio.to_thread(results.end, file.lines, _ENDED_EARLY[status])
        batch.total = len(file.lines)
        self._store.keep_results(batch)
        self._enter(batch, status)

    async def _read(self, batch: BatchRecord) -> JobFile:
        input_file = self._store.files.get(batch.input_file_id)
        if input_file is None:
            return JobFile(
                self._store.running_path(batch, OUTPUT),
                problems=[Problem("file_not_found", "The input file is gone.", "input_file_id")],
            )
        path, requests_max = self._store.path_of(input_file), self._gateway.settings.batch.requests_max
        return await asyncio.to_thread(read_job, path, batch.endpoint, requests_max)

    def _enter(self, batch: BatchRecord, status: Status) -> None:
        batch.enter(status, self._wall_clock())
        self._store.save(batch)


def _is_cancelling(batch: BatchRecord) -> bool:
    """May change at any time that the task waits."""
    return batch.status is Status.CANCELLING


class _Results:
    """The two growing files of a batch, and its counts."""

    def __init__(self, store: BatchStore, batch: BatchRecord, stack: ExitStack) -> None:
        self._batch = batch
        paths = [store.running_path(batch, kind) for kind in (OUTPUT, ERRORS)]
        answered, failed = (done_ids(path) for path in paths)
        self._done = answered | failed
        batch.completed, batch.failed = len(answered), len(failed - answered)
        self._output: IO[bytes]
        self._errors: IO[bytes]
        self._output, self._errors = (stack.enter_context(path.open("ab", buffering=0)) for path in paths)

    def left(self, lines: list[JobLine]) -> list[JobLine]:
        """Those without a result."""
        return [line for line in lines if line.custom_id not in self._done]

    def take(self, result: LineResult) -> None:
        if result.is_answer:
            self._output.write(result.encoded())
            self._batch.completed += 1
        else:
            self._errors.write(result.encoded())
            self._batch.failed += 1

    def end(self, lines: list[JobLine], why: tuple[str, str]) -> None:
        """Say of each line without a result why it has none."""
        for line in self.left(lines):
            self.take(LineResult(line, f"{self._batch.id}-{line.number}", ended=why))
