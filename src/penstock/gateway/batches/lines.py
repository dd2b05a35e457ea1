"""The lines of a batch's file: where each is, what is wrong with it, and how its answer is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from penstock.core.errors import PenstockError
from penstock.gateway.batches.records import Problem

CHAT_ENDPOINT: Final = "/v1/chat/completions"
ENDPOINTS: Final = (CHAT_ENDPOINT, "/v1/completions")
CUSTOM_ID_CHARS_MAX: Final = 512
LINE_BYTES_MAX: Final = 8 << 20
PROBLEMS_MAX: Final = 100  # told of one file
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")

JSON = dict[str, Any]


@dataclass(slots=True)
class JobLine:
    """One request of a job, by its place in the file."""

    number: int  # from 1, empty lines counted
    offset: int
    length: int
    custom_id: str
    endpoint: str


@dataclass(slots=True)
class JobFile:
    """A file of requests, without their bodies: those are read when their turn comes."""

    path: Path
    lines: list[JobLine] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def body(self, line: JobLine) -> JSON:
        """The request's body, as it was checked before."""
        with self.path.open("rb") as file:
            file.seek(line.offset)
            body = orjson.loads(file.read(line.length))["body"]
        assert isinstance(body, dict), "checked when the file was read"
        return body


def read_job(path: Path, endpoint: str | None, requests_max: int) -> JobFile:
    """Look at every line once. `endpoint`: the one all must be for; None: any that is served.

    What is wrong is in `problems`, at most `PROBLEMS_MAX`; the job may run only where there is none.
    """
    job = JobFile(path)
    seen: set[str] = set()
    for number, offset, raw in _raw_lines(path):
        if len(job.problems) >= PROBLEMS_MAX:
            break
        if len(job.lines) >= requests_max:
            message = f"The file has more than {requests_max} requests."
            job.problems.append(Problem("too_many_requests", message))
            break
        found = _look_at(raw, number, offset, endpoint)
        if isinstance(found, JobLine) and found.custom_id in seen:
            found = Problem("duplicate_custom_id", "`custom_id` was used before.", "custom_id", number)
        if isinstance(found, Problem):
            job.problems.append(found)
        else:
            seen.add(found.custom_id)
            job.lines.append(found)
    if not job.lines and not job.problems:
        job.problems.append(Problem("empty_file", "The file has no requests."))
    return job


def _raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not empty. A longer line than allowed comes cut."""
    offset = 0
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LINE_BYTES_MAX + 1):
            number += 1
            if raw.strip():
                yield number, offset, raw
            offset += len(raw)
            while len(raw) > LINE_BYTES_MAX and not raw.endswith(b"\n"):
                raw = file.readline(LINE_BYTES_MAX + 1)
                offset += len(raw)


def _look_at(raw: bytes, number: int, offset: int, endpoint: str | None) -> JobLine | Problem:
    def wrong(code: str, message: str, param: str | None = None) -> Problem:
        return Problem(code, message, param, number)

    if len(raw) > LINE_BYTES_MAX:
        return wrong("line_too_long", f"The line is longer than {LINE_BYTES_MAX} bytes.")
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return wrong("invalid_json_line", f"The line is not valid JSON: {error.msg}.")
    if not isinstance(row, dict):
        return wrong("invalid_json_line", "The line must be a JSON object.")
    custom_id, url = row.get("custom_id"), row.get("url")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_CHARS_MAX:
        text = f"`custom_id` must be a text of 1 to {CUSTOM_ID_CHARS_MAX} characters."
        return wrong("invalid_custom_id", text, "custom_id")
    if _CONTROL.search(custom_id):
        return wrong("invalid_custom_id", "`custom_id` may not hold control characters.", "custom_id")
    if row.get("method") != "POST":
        return wrong("invalid_method", '`method` must be `"POST"`.', "method")
    allowed = ENDPOINTS if endpoint is None else (endpoint,)
    if not isinstance(url, str) or url not in allowed:
        wanted = " or ".join(f"`{each}`" for each in allowed)
        return wrong("invalid_url", f"`url` must be {wanted}.", "url")
    if not isinstance(row.get("body"), dict):
        return wrong("invalid_body", "`body` must be an object.", "body")
    return JobLine(number, offset, len(raw), custom_id, url)


# ---- answers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LineResult:
    """What came of one line: an answer's body, or an error."""

    line: JobLine
    request_id: str
    body: JSON | None = None
    error: PenstockError | None = None
    ended: tuple[str, str] | None = None  # code and message, where the batch ended before the line's turn

    @property
    def is_answer(self) -> bool:
        return self.body is not None

    def json(self) -> JSON:
        """The line of the output or the error file."""
        response, error = None, None
        if self.body is not None:
            response = {"status_code": 200, "request_id": self.request_id, "body": self.body}
        elif self.error is not None:
            wire = self.error.wire()
            response = {"status_code": self.error.status, "request_id": self.request_id, "body": wire}
        elif self.ended is not None:
            error = {"code": self.ended[0], "message": self.ended[1]}
        return {
            "id": f"batch_req_{self.request_id}",
            "custom_id": self.line.custom_id,
            "response": response,
            "error": error,
        }

    def encoded(self) -> bytes:
        return orjson.dumps(self.json(), option=orjson.OPT_APPEND_NEWLINE)


def done_ids(path: Path) -> set[str]:
    """`custom_id` of every whole line at `path`; what a crash left of a last one is cut off."""
    found: set[str] = set()
    if not path.exists():
        return found
    whole = 0
    with path.open("r+b") as file:
        for raw in file:
            try:
                row = orjson.loads(raw)
                custom_id = row["custom_id"]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                break
            if not raw.endswith(b"\n"):
                break
            found.add(custom_id)
            whole += len(raw)
        file.truncate(whole)
    return found
