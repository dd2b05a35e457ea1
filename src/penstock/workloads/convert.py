"""Write a trace as our own request log."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO, cast

from penstock.core.errors import EnvironmentMissing, TraceError
from penstock.workloads.readers import request_log
from penstock.workloads.trace import TraceRow


def write_request_log(rows: Iterable[TraceRow], out: Path) -> int:
    """Write `rows` to `out` (gzip when it ends in `.gz`); returns the count. On an error nothing stays.

    The rows must agree on one block size, which goes into the header. Raises TraceError when they do not,
    and EnvironmentMissing when the file cannot be written.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise TraceError("there is nothing to write.", hint="the trace has no rows")
    block_tokens = first.block_tokens
    count = 0
    with _atomic_text(out) as file:
        file.write(request_log.header_line(block_tokens) + "\n")
        for row in chain([first], iterator):
            if row.block_hashes is not None and row.block_tokens != block_tokens:
                raise TraceError(
                    f"row {count} has prefix blocks of {row.block_tokens} tokens, row 0 of {block_tokens}.",
                    hint="a request log has one block size; convert the parts apart",
                )
            file.write(request_log.row_line(row) + "\n")
            count += 1
    return count


@contextmanager
def _atomic_text(path: Path) -> Iterator[TextIO]:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with cast(TextIO, opener(part, "wt", encoding="utf-8")) as file:
            yield file
        part.replace(path)
    except OSError as problem:
        raise EnvironmentMissing(
            f"`{path}` cannot be written: {problem.strerror or problem}.", hint="name a writable folder"
        ) from None
    finally:
        part.unlink(missing_ok=True)
