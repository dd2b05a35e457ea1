"""What a replay shows while it runs, on stderr: a live panel on a terminal, a line every 5 s elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from penstock.workloads.tally import Tally

LINE_EVERY_S = 5.0


class Progress(Protocol):
    """Told about the tally a few times a second, from the run's own thread."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, tally: Tally, elapsed_s: float) -> None: ...


class NoProgress:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was opened."""

    def update(self, tally: Tally, elapsed_s: float) -> None:
        """Nobody looks."""


class LineProgress(NoProgress):
    """One plain line every LINE_EVERY_S, for logs."""

    def __init__(self, write: Callable[[str], object] = sys.stderr.write) -> None:
        self._write = write
        self._next_s = LINE_EVERY_S

    def update(self, tally: Tally, elapsed_s: float) -> None:
        if elapsed_s >= self._next_s:
            self._next_s = elapsed_s + LINE_EVERY_S
            self._write("  ".join(f"{name} {value}" for name, value in facts(tally, elapsed_s)) + "\n")


class LiveProgress:
    """A panel that is redrawn in place."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, tally: Tally, elapsed_s: float) -> None:
        table = Table.grid(padding=(0, 3))
        found = facts(tally, elapsed_s)
        for _ in found:
            table.add_column(justify="right")
        table.add_row(*(f"[dim]{name}[/dim]" for name, _ in found))
        table.add_row(*(f"[bold]{value}[/bold]" for _, value in found))
        self._live.update(table, refresh=True)


def choose_progress(quiet: bool) -> Progress:
    if quiet:
        return NoProgress()
    return LiveProgress() if sys.stderr.isatty() else LineProgress()


def facts(tally: Tally, elapsed_s: float) -> list[tuple[str, str]]:
    """Names and values, in the order they are shown."""
    goodput_rps = tally.attained / elapsed_s if elapsed_s > 0 else 0.0
    return [
        ("elapsed", f"{elapsed_s:.0f}s"),
        ("sent", str(tally.sent)),
        ("in flight", str(tally.in_flight)),
        ("answered", str(tally.answered)),
        ("failed", str(tally.failed)),
        ("TTFT p50", _milliseconds(tally.ttft_ms(0.5))),
        ("TTFT p99", _milliseconds(tally.ttft_ms(0.99))),
        ("out/s", f"{tally.output_rate(elapsed_s):.0f}"),
        ("goodput", f"{goodput_rps:.2f}/s"),
    ]


def _milliseconds(value_ms: float | None) -> str:
    if value_ms is None:
        return "-"
    return f"{value_ms:.0f}ms" if value_ms < 10_000 else f"{value_ms / 1e3:.1f}s"
