"""Reading `multipart/form-data` as it arrives (RFC 7578): a file goes to disk and never into memory whole.

    feed(bytes) ─► PartBegin, bytes of its body …, PartEnd, PartBegin, …

Bounded: headers of a part, the number of parts, and what is held back is shorter than a boundary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from enum import Enum
from typing import Final

from penstock.core.errors import InvalidRequest

BOUNDARY_CHARS_MAX: Final = 70  # RFC 2046
HEADERS_BYTES_MAX: Final = 8192
PARTS_MAX: Final = 32
PADDING_BYTES_MAX: Final = 128  # white space behind a boundary
_HINT: Final = "Send the form as OpenAI's clients do, with the fields `purpose` and `file`."


@dataclass(frozen=True, slots=True)
class PartBegin:
    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartEnd:
    pass


Event = PartBegin | bytes | PartEnd


class _State(Enum):
    PREAMBLE = 0
    BOUNDARY = 1  # behind one: another part, or the end
    HEADERS = 2
    BODY = 3
    END = 4


def boundary_of(content_type: str) -> bytes:
    """The boundary that the header names. Raises InvalidRequest."""
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/form-data" or not boundary:
        raise InvalidRequest("The body is not declared as `multipart/form-data` with a boundary.", hint=_HINT)
    if len(boundary) > BOUNDARY_CHARS_MAX or not boundary.isascii():
        raise InvalidRequest("The boundary of the form is not valid.", hint=_HINT)
    return boundary.encode("ascii")


class MultipartReader:
    """Call `feed` with what arrives, then `close`. Raises InvalidRequest for what is no form."""

    def __init__(self, boundary: bytes) -> None:
        self._mark = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # so that the first boundary looks like the others
        self._state = _State.PREAMBLE
        self._parts = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        """All that `data` completes. Exhaust it before the next call."""
        self._buffer += data
        while self._state is not _State.END:
            if self._state is _State.HEADERS:
                begin = self._headers()
                if begin is None:
                    return
                yield begin
            elif self._state is _State.BOUNDARY:
                if not self._boundary():
                    return
            else:
                place = self._buffer.find(self._mark)
                is_body = self._state is _State.BODY
                whole = place if place >= 0 else max(0, len(self._buffer) - len(self._mark) + 1)
                if is_body and whole:
                    yield bytes(self._buffer[:whole])
                del self._buffer[:whole]
                if place < 0:
                    return
                del self._buffer[: len(self._mark)]
                self._state = _State.BOUNDARY
                if is_body:
                    yield PartEnd()
        self._buffer.clear()

    def close(self) -> None:
        """The body has ended. Raises InvalidRequest where the form had not."""
        if self._state is not _State.END:
            raise InvalidRequest("The form ends before its last boundary.", hint=_HINT)

    def _boundary(self) -> bool:
        if self._buffer[:2] == b"--":
            self._state = _State.END
            return True
        end = self._buffer.find(b"\r\n")
        if end < 0 and len(self._buffer) <= PADDING_BYTES_MAX:
            return False
        if end < 0 or self._buffer[:end].strip(b" \t"):
            raise InvalidRequest("A boundary of the form is not followed by a part.", hint=_HINT)
        del self._buffer[:end]  # the line's end stays: a part without headers begins with an empty line
        self._state = _State.HEADERS
        return True

    def _headers(self) -> PartBegin | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEADERS_BYTES_MAX:
                raise InvalidRequest("The headers of a part of the form are too large.", hint=_HINT)
            return None
        self._parts += 1
        if end > HEADERS_BYTES_MAX or self._parts > PARTS_MAX:
            raise InvalidRequest("The form has too many parts, or too large ones.", hint=_HINT)
        begin = _part_of(bytes(self._buffer[:end]))
        del self._buffer[: end + 4]
        self._state = _State.BODY
        return begin


def _part_of(head: bytes) -> PartBegin:
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() != b"content-disposition":
            continue
        message = Message()
        message["content-disposition"] = value.decode("utf-8", errors="replace").strip()
        name = message.get_param("name", header="content-disposition")
        if isinstance(name, str):
            return PartBegin(name, message.get_filename())
    raise InvalidRequest("A part of the form has no name.", hint=_HINT)
