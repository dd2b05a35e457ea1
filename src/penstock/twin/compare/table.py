"""A comparison on a terminal, readable without colour; foreign names are never taken as markup."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from penstock.twin.compare.document import Comparison
from penstock.twin.compare.run import Run
from penstock.workloads import wording
from penstock.workloads.report import Summary


def print_comparison(comparison: Comparison, console: Console) -> None:
    console.print(f"{comparison.title}: compare", style="bold", markup=False)
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    console.print(_runs(comparison))
    changes = _changes(comparison)
    if changes.row_count:
        console.print(changes)


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _runs(comparison: Comparison) -> Table:
    table = _table(
        "\nrate", "\nstack", "\nreq/s", "TTFT\np50", "\np99", "TPOT\np50", "\np99", "E2E\np50", "\np99",
        "goodput\nreq/s", "\nattained", "\npreempt", "KV\nmax", "fair\nJain", "due\nmin", left=2,
    )  # fmt: skip
    last = None
    for run in comparison.runs:
        table.add_row(f"{run.rate:.3g}×" if run.rate != last else "", escape(run.stack), *_cells(run))
        last = run.rate
    return table


def _cells(run: Run) -> list[str]:
    latencies = [cell for name in ("ttft", "tpot", "e2e") for cell in _ends(run.latency_ms[name])]
    fair, due = run.fairness.served_frac_jain, run.fairness.due_frac_min
    return [
        "-" if run.requested_rps is None else wording.number(run.requested_rps),
        *latencies,
        wording.number(run.goodput.goodput_rps),
        wording.percent(run.goodput.attained_frac),
        str(run.preemptions),
        wording.percent(run.kv_usage_max),
        "-" if fair is None else f"{fair:.3f}",
        "-" if due is None else wording.percent(due),
    ]


def _ends(summary: Summary | None) -> tuple[str, str]:
    if summary is None:
        return "-", "-"
    return wording.milliseconds(summary.p50), wording.milliseconds(summary.p99)


def _changes(comparison: Comparison) -> Table:
    """Who gained and who lost at the focus rate, against the first stack."""
    first = comparison.compared[0]
    table = _table(
        f"\nagainst {escape(first)} at {comparison.focus:.3g}×", "\nrequests of", "\nrequests", "\ngained",
        "\nlost", "SLO\ngained", "\nlost", "E2E ratio\np50", left=2,
    )  # fmt: skip
    for run in comparison.at_focus():
        for index, group in enumerate(run.against_first):
            ratio = "-" if group.e2e_ratio_p50 is None else f"{group.e2e_ratio_p50:.3f}"
            kind = "" if group.kind == "all" else f"{group.kind} "
            counts = (group.requests, group.gained, group.lost, group.slo_gained, group.slo_lost)
            table.add_row(
                escape(run.stack) if index == 0 else "", kind + escape(group.name), *map(str, counts), ratio
            )
    return table
