"""Writing a request log while serving: off the event loop, bounded, and in order of arrival at the end.

    end of a request ─► queue (bounded) ─► writer thread: hash blocks, one line ─► file, in order of ending
    shutdown         ─► drain the queue ─► rewrite the file in order of arrival

Text and tokens never reach the file: blocks are hashed with random bytes of the log's own, which are thrown
away, so that nobody can test a guess, and ids of two logs do not compare. Sessions are hashed the same way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import secrets
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from penstock.core.line_file import LineFile
from penstock.core.metrics import RequestOutcome
from penstock.core.request import Request
from penstock.workloads.fields import BLOCKS_MAX, LABEL_CHARS_MAX
from penstock.workloads.lines import LINE_BYTES_MAX
from penstock.workloads.readers import request_log
from penstock.workloads.trace import SessionTurns, TraceRow

QUEUE_ENDS_MAX: Final = 4096
QUEUE_TOKENS_MAX: Final = 4_000_000
HASH_BYTES: Final = 8
SALT_BYTES: Final = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _End:
    outcome: RequestOutcome
    request: Request
    output: Sequence[int]

    @property
    def token_count(self) -> int:
        return self.request.prompt_len + len(self.output)


class RequestLog:
    """A gateway's `Recorder`. `take` from one thread, `close` once nothing ends any more.

    `clock` is the one that arrivals are told on; the log's times are Unix time.
    """

    def __init__(
        self,
        path: Path,
        block_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        """Creates the file and starts the writer. Raises EnvironmentMissing."""
        self._path = path
        self._block_tokens = block_tokens
        self._epoch_s = unix_time() - clock()
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._file = LineFile(path, request_log.header(block_tokens))
        self._queue: queue.SimpleQueue[_End | None] = queue.SimpleQueue()  # `take` bounds it
        self._taken_tokens = 0  # only `take` adds here, and only the writer there: no lock
        self._done_tokens = 0
        self._written = 0
        self._dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()

    @property
    def written(self) -> int:
        return self._written

    @property
    def dropped(self) -> int:
        """Ends that found the queue full, or the file ended (a full disk)."""
        return self._dropped

    def take(self, outcome: RequestOutcome, request: Request, output: Sequence[int]) -> None:
        """Queue an end for the writer, or drop it; never blocks. `output` is not changed afterwards."""
        held_tokens = self._taken_tokens - self._done_tokens
        if self._queue.qsize() >= QUEUE_ENDS_MAX or held_tokens > QUEUE_TOKENS_MAX or not self._file.is_open:
            self._drop()
            return
        end = _End(outcome, request, output)
        self._taken_tokens += end.token_count
        self._queue.put(end)

    def close(self, timeout_s: float) -> None:
        """Write what is queued, and put the file in order. Safe to call twice."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the request log could not be finished in time; its rows stay in order of ending")
            return
        self._file.close()
        try:
            put_in_order(self._path)
        except OSError as error:
            logger.warning("the request log stays in order of ending: %s", error.strerror or error)

    def _drop(self) -> None:
        self._dropped += 1
        if self._dropped & (self._dropped - 1) == 0:  # 1, 2, 4, 8 …
            logger.warning("the request log has dropped %d rows: its writer does not keep up", self._dropped)

    def _write_all(self) -> None:
        while (end := self._queue.get()) is not None:
            if self._file.write_line(self._line_of(end)):
                self._written += 1
            self._done_tokens += end.token_count
            if self._queue.empty():
                self._file.flush()

    def _line_of(self, end: _End) -> str:
        outcome, request = end.outcome, end.request
        last_s = outcome.last_token_s
        prompt_ids, output_ids = self._block_ids(request, end.output)
        row = TraceRow(
            arrival_s=max(0.0, request.arrival_s + self._epoch_s),
            prompt_tokens=request.prompt_len,
            output_tokens=len(end.output),
            tenant=self._label(request.tenant),
            slo_class=self._label(request.slo_class),
            session_id=None if (program := request.program) is None else self._hashed(program[1]),
            tool=None if request.tool is None else self._label(request.tool),
            is_last_turn=request.is_last_turn,
            block_hashes=prompt_ids,
            output_block_hashes=output_ids,
            elapsed_s=None if last_s is None else last_s - outcome.arrival_s,
        )
        return request_log.row_line(row, outcome.finish, outcome.ttft_s)

    def _block_ids(
        self, request: Request, output: Sequence[int]
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Ids of the prompt's blocks and of those the output filled; none of a prompt too long for a row."""
        prompt = request.prompt_tokens
        tokens_max = self._block_tokens * BLOCKS_MAX // 2
        if prompt is None or len(prompt) + len(output) > tokens_max:
            return None, None
        root = hashlib.blake2b(request.cache_salt.encode(), digest_size=HASH_BYTES, key=self._salt).digest()
        prompt_ids = chain_ids(prompt, self._block_tokens, root, self._salt)
        full_before = len(prompt) // self._block_tokens
        start = full_before * self._block_tokens
        before = prompt_ids[full_before - 1].to_bytes(HASH_BYTES, "big") if full_before else root
        rest = [*prompt[start:], *output]
        whole = rest[: len(rest) // self._block_tokens * self._block_tokens]
        return prompt_ids, chain_ids(whole, self._block_tokens, before, self._salt)

    def _label(self, name: str) -> str:
        """A name as it is, where a reader of the log would take it."""
        return name if 1 <= len(name) <= LABEL_CHARS_MAX and name.isprintable() else self._hashed(name)

    def _hashed(self, name: str) -> str:
        content = name.encode(errors="surrogatepass")
        return hashlib.blake2b(content, digest_size=HASH_BYTES, key=self._salt).hexdigest()


def chain_ids(tokens: Sequence[int], block_tokens: int, root: bytes, salt: bytes) -> tuple[int, ...]:
    """An id for each block of `tokens`, the last perhaps partial: a hash of all up to its end. Pure."""
    ids, previous = [], root
    for start in range(0, len(tokens), block_tokens):
        content = array("q", tokens[start : start + block_tokens]).tobytes()
        previous = hashlib.blake2b(previous + content, digest_size=HASH_BYTES, key=salt).digest()
        ids.append(int.from_bytes(previous, "big"))
    return tuple(ids)


def put_in_order(path: Path) -> None:
    """Rewrite a request log by time of arrival, and number the turns of sessions. Raises OSError.

    Takes 24 bytes of memory a row. The old file stays until the new one is whole.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with path.open("rb") as file:
            arrivals, offsets = _index(file)
            order = np.argsort(np.frombuffer(arrivals, dtype=np.float64), kind="stable")
            with part.open("wb") as out:
                file.seek(0)
                out.write(file.readline(LINE_BYTES_MAX))
                turns = SessionTurns()
                for index in order:
                    file.seek(offsets[index])
                    out.write(_with_turn(file.readline(LINE_BYTES_MAX), turns))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _index(file: BinaryIO) -> tuple[array[float], array[int]]:
    """Arrival and place of each row; the header has been passed."""
    arrivals, offsets = array("d"), array("Q")
    offset = len(file.readline(LINE_BYTES_MAX))
    while line := file.readline(LINE_BYTES_MAX):
        arrivals.append(json.loads(line)["arrival_s"])
        offsets.append(offset)
        offset += len(line)
    return arrivals, offsets


def _with_turn(line: bytes, turns: SessionTurns) -> bytes:
    row = json.loads(line)
    if "session_id" not in row:
        return line
    row["turn"] = turns.next(row["session_id"])
    return json.dumps(row).encode() + b"\n"
