"""Server-sent events, the part that OpenAI-compatible servers use: `data:` lines and comments."""

from __future__ import annotations

EVENT_BYTES_MAX = 4 << 20  # one chunk of a completion is a few hundred bytes; with logprobs a few thousand


class EventTooLarge(ValueError):
    """The stream sends an event larger than EVENT_BYTES_MAX, or no line end at all."""


class SseParser:
    """Feed it bytes as they come; it returns the payloads of the events that became complete.

    Lines end in LF or CRLF. Several `data:` lines of one event are joined by LF; comments and other fields
    (`event:`, `id:`, `retry:`) are skipped.
    """

    def __init__(self) -> None:
        self._partial = b""  # the line that has not ended yet
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Changes the parser's state. Raises EventTooLarge."""
        lines = (self._partial + received).split(b"\n")
        self._partial = lines.pop()
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._size += len(line)
        if self._size + len(self._partial) > EVENT_BYTES_MAX:
            raise EventTooLarge(f"an event is larger than {EVENT_BYTES_MAX} bytes")
        return events
