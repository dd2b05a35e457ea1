"""Files that a command writes when its work is done."""

from __future__ import annotations

import tempfile
from pathlib import Path

from penstock.core.errors import EnvironmentMissing


def check_output(path: Path) -> None:
    """Raise EnvironmentMissing where no file can be written to `path`: before the work, not behind it."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> EnvironmentMissing:
    return EnvironmentMissing(
        f"`{path}` cannot be written: {error.strerror or error}.",
        hint="Name a file in a writable folder with `--out`.",
    )
