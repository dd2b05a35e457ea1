"""CSV by column name, for the readers whose releases move and add columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

from penstock.workloads.fields import shown
from penstock.workloads.lines import Lines


class Table:
    """The rows of one CSV file below its header. `position(name)` finds a column."""

    def __init__(self, lines: Lines, required: Sequence[str]) -> None:
        """Reads the header. Raises TraceError when a required column is missing or named twice."""
        self._lines = lines
        # strict: a quote that never closes is an error instead of a field that eats the file
        self._reader = csv.reader(iter(lines), strict=True)
        self.header = [name.strip() for name in self._next() or []]
        for name in required:
            if self.header.count(name) != 1:
                problem = "the column appears twice" if name in self.header else "the column is missing"
                raise lines.error(name, problem, f"the header is {shown(self.header)}")

    def position(self, name: str) -> int | None:
        return self.header.index(name) if name in self.header else None

    def __iter__(self) -> Iterator[list[str]]:
        """Rows with exactly the header's columns; blank lines are skipped."""
        width = len(self.header)
        while (row := self._next()) is not None:
            if len(row) == width:
                yield row
            elif row:
                raise self._lines.error(
                    None, f"{len(row)} columns where the header has {width}", f"the row is {shown(row)}"
                )

    def _next(self) -> list[str] | None:
        try:
            return next(self._reader, None)
        except csv.Error as problem:
            raise self._lines.error(None, f"it is not CSV ({problem})", "check the quoting") from None


def header_of(first_line: str) -> frozenset[str]:
    """Column names of a first line, for telling formats apart."""
    return frozenset(name.strip() for name in first_line.split(","))
