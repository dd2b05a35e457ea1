"""Open a trace: find the file, tell its format, and hand out rows in time order from second 0."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from penstock.core.errors import ConfigError, TraceError
from penstock.workloads.fields import unknown_format
from penstock.workloads.lines import Lines
from penstock.workloads.readers import FORMATS, TraceFormat
from penstock.workloads.trace import TraceRow

SORT_ROWS_MAX = 100_000  # how far a row may be out of place for `sort` to mend it
SPREAD_ROWS_MAX = 100_000  # rows that may share one stamp when spreading
SAMPLES = {"burstgpt1": "burstgpt1_first400.csv", "burstgpt3": "burstgpt3_first400.csv"}


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """`format` None detects. `sort` mends rows out of order. `spread_s` spreads rows that share a stamp."""

    format: str | None = None
    sort: bool = False
    spread_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace that can be read any number of times; each reading opens the file anew."""

    name: str
    path: Path
    format: TraceFormat
    options: ReadOptions

    def __iter__(self) -> Iterator[TraceRow]:
        """Rows by time, ties in file order, the first at 0 s. Raises TraceError at the first bad row."""
        lines = Lines(self.path, self.name)
        rows = _sorted(self.format.rows(lines)) if self.options.sort else self.format.rows(lines)
        rows = _relative(rows, lines)
        return _spread(rows, self.options.spread_s) if self.options.spread_s > 0 else rows


def open_trace(source: str | Path, options: ReadOptions | None = None) -> Trace:
    """A file path or `sample:NAME`. Reads the first line only. Raises TraceError or ConfigError."""
    options = options or ReadOptions()
    path, name = _locate(str(source))
    if options.format is None:
        return Trace(name, path, _detect(path, name), options)
    if options.format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(f"`{options.format}` is not a trace format.", hint=f"known formats are {known}")
    return Trace(name, path, FORMATS[options.format], options)


def _locate(source: str) -> tuple[Path, str]:
    if not source.startswith("sample:"):
        return Path(source).expanduser(), Path(source).name
    file_name = SAMPLES.get(source.removeprefix("sample:"))
    if file_name is None:
        known = ", ".join(f"`sample:{name}`" for name in SAMPLES)
        raise TraceError(f"there is no bundled trace `{source}`.", hint=f"bundled traces are {known}")
    return Path(str(resources.files("penstock.workloads") / "samples" / file_name)), source


def _detect(path: Path, name: str) -> TraceFormat:
    for line in Lines(path, name):
        if line.strip():
            for entry in FORMATS.values():
                if entry.claims(line):
                    return entry
            raise unknown_format(name, line, ", ".join(FORMATS))
    raise _empty(name)


def _empty(name: str) -> TraceError:
    return TraceError(f"`{name}` has no rows.", hint="a trace needs at least one request")


def _relative(rows: Iterator[TraceRow], lines: Lines) -> Iterator[TraceRow]:
    """Subtract the first arrival; refuse a time that goes back, and a trace without rows."""
    origin_s: float | None = None
    last_s = 0.0
    for row in rows:
        if origin_s is None:
            origin_s = last_s = row.arrival_s
        if row.arrival_s < last_s:
            raise lines.error(
                "time",
                f"the time goes back from {last_s:g} s to {row.arrival_s:g} s",
                "`--sort` puts rows in order that are at most 100,000 rows out of place",
            )
        last_s = row.arrival_s
        row.arrival_s -= origin_s
        yield row
    if origin_s is None:
        raise _empty(lines.name)


def _sorted(rows: Iterator[TraceRow]) -> Iterator[TraceRow]:
    """Order by time, ties by file order, holding SORT_ROWS_MAX rows; O(log SORT_ROWS_MAX) a row."""
    held: list[tuple[float, int, TraceRow]] = []
    for index, row in enumerate(rows):
        heapq.heappush(held, (row.arrival_s, index, row))
        if len(held) > SORT_ROWS_MAX:
            yield heapq.heappop(held)[2]
    while held:
        yield heapq.heappop(held)[2]


def _spread(rows: Iterator[TraceRow], spread_s: float) -> Iterator[TraceRow]:
    """Space the rows of one stamp evenly over `spread_s`, or up to the next stamp where that is nearer."""
    group: list[TraceRow] = []
    for row in rows:
        if group and (row.arrival_s > group[0].arrival_s or len(group) >= SPREAD_ROWS_MAX):
            yield from _spaced(group, min(spread_s, row.arrival_s - group[0].arrival_s))
            group = []
        group.append(row)
    yield from _spaced(group, spread_s)


def _spaced(group: list[TraceRow], over_s: float) -> Iterator[TraceRow]:
    for index, row in enumerate(group):
        yield replace(row, arrival_s=row.arrival_s + over_s * index / len(group))
