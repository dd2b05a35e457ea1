"""A file of JSON lines that a running server writes about itself: bounded, and never the server's end.

A disk that fills up, or the size limit, ends the recording with one message on stderr; what serves goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from penstock.core.errors import EnvironmentMissing
from penstock.core.units import GIB, format_bytes

FILE_BYTES_MAX: Final = 16 * GIB
OLD_FILES_MAX: Final = 1000


class LineFile:
    """Appends JSON objects, one a line, behind a header line. Not thread-safe."""

    def __init__(self, path: Path, header: Mapping[str, Any], bytes_max: int = FILE_BYTES_MAX) -> None:
        """Creates the file; one that is there already is kept beside it. Raises EnvironmentMissing."""
        self.path = path
        self._bytes_max = bytes_max
        self._bytes = 0
        try:
            _keep_old(path)
            self._file: TextIO | None = path.open("x", encoding="utf-8")
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
        self._bytes += len(text) + 1
        if self._bytes > self._bytes_max:
            self._give_up(f"it has reached {format_bytes(self._bytes_max)}")
            return False
        try:
            self._file.write(text + "\n")
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return False
        return True

    def flush(self) -> None:
        if self._file is None:
            return
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def close(self) -> None:
        """Safe to call twice."""
        self.flush()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _give_up(self, why: str) -> None:
        print(f"recording to {self.path.name} has ended: {why}", file=sys.stderr, flush=True)
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except OSError:
            pass  # its last lines are lost, as was just said


def _keep_old(path: Path) -> None:
    """Rename what lies at `path` to the first free of `path.1`, `path.2` and so on. Raises OSError."""
    if not path.exists():
        return
    for number in range(1, OLD_FILES_MAX):
        kept = path.with_name(f"{path.name}.{number}")
        if not kept.exists():
            path.rename(kept)
            return
    raise FileExistsError(f"there are {OLD_FILES_MAX - 1} older files beside it")
