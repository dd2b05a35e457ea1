"""A file of JSON lines that a running server writes about itself: bounded, and never the server's end.

A disk that fills up, or the size limit, ends the recording with one message on stderr; what serves goes on.
Whole lines reach the file in one write, so that a process killed at any time leaves whole lines.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from penstock.core.errors import EnvironmentMissing
from penstock.core.units import GIB, format_bytes

FILE_BYTES_MAX: Final = 16 * GIB
OLD_FILES_MAX: Final = 1000
BUFFER_BYTES: Final = 64 << 10


class LineFile:
    """Appends JSON objects, one a line, behind a header line. Not thread-safe."""

    def __init__(self, path: Path, header: Mapping[str, Any], bytes_max: int = FILE_BYTES_MAX) -> None:
        """Creates the file; one that is there already is kept beside it. Raises EnvironmentMissing."""
        self.path = path
        self._bytes_max = bytes_max
        self._written_bytes = 0
        self._pending: list[str] = []
        self._pending_bytes = 0
        try:
            _keep_old(path)
            self._file: io.FileIO | None = io.FileIO(path, "x")
        except OSError as error:
            raise EnvironmentMissing(
                f"`{path}` cannot be written: {error.strerror or error}.", hint="Name a writable folder."
            ) from error
        self.write(header)
        self.flush()

    @property
    def is_open(self) -> bool:
        """False once closed, or once writing has failed."""
        return self._file is not None

    def write(self, fields: Mapping[str, Any]) -> bool:
        """One line; it may stay in a buffer until `flush`. False where recording has ended."""
        return self.write_line(json.dumps(fields, ensure_ascii=True, separators=(",", ":")))

    def write_line(self, text: str) -> bool:
        """`text` is one line of ASCII, without its end."""
        if self._file is None:
            return False
        self._pending.append(text)
        self._pending_bytes += len(text) + 1
        if self._written_bytes + self._pending_bytes > self._bytes_max:
            self._pending.pop()
            self.flush()
            if self._file is not None:
                self._give_up(f"it has reached {format_bytes(self._bytes_max)}")
        elif self._pending_bytes >= BUFFER_BYTES:
            self.flush()
        return self._file is not None

    def flush(self) -> None:
        """Hand the whole lines to the system."""
        if self._file is None or not self._pending:
            return
        content = "\n".join([*self._pending, ""]).encode("ascii")
        self._pending.clear()
        self._pending_bytes = 0
        try:
            _write_all(self._file, content)
        except OSError as error:
            self._give_up(error.strerror or str(error))
        else:
            self._written_bytes += len(content)

    def close(self) -> None:
        """Safe to call twice."""
        self.flush()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _give_up(self, why: str) -> None:
        """End the recording behind its last whole line."""
        print(f"recording to {self.path.name} has ended: {why}", file=sys.stderr, flush=True)
        file, self._file = self._file, None
        assert file is not None
        with contextlib.suppress(OSError):  # its last lines are lost, as was just said
            file.truncate(self._written_bytes)
            file.close()


def _write_all(file: io.FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _keep_old(path: Path) -> None:
    """Rename what lies at `path` to the first free of `path.1`, `path.2` and so on. Raises OSError."""
    if not path.is_file():  # a device or a pipe is nothing to move away; opening it will be refused
        return
    for number in range(1, OLD_FILES_MAX):
        kept = path.with_name(f"{path.name}.{number}")
        if not kept.exists():
            path.rename(kept)
            return
    raise FileExistsError(f"there are {OLD_FILES_MAX - 1} older files beside it")
