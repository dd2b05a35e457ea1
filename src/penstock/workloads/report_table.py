"""The report on a terminal, readable without colour; foreign names are never taken as markup."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from penstock.workloads import wording
from penstock.workloads.report import Report
from penstock.workloads.report_facts import facts


def print_report(report: Report, console: Console) -> None:
    console.print(f"{report.title}: {report.kind}", style="bold", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    console.print(_summary(report))
    if any(report.latency_ms.values()):
        console.print(_latency(report))
    if report.classes:
        console.print(_classes(report))
    if report.requests.errors:
        console.print(_errors(report))
    run_facts = _grid()
    for name, value in facts(report):
        if name not in report.configuration and name.replace(" ", "_") not in report.configuration:
            run_facts.add_row(name, escape(value))
    console.print(run_facts)


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table


def _summary(report: Report) -> Table:
    counts, rates = report.requests, report.rates
    table = _grid()
    table.add_row("answered", f"{counts.answered} of {counts.measured}, {counts.lost} lost")
    table.add_row("rate", f"{_rate(rates.realised_rps)} realised, {_rate(rates.requested_rps)} requested")
    table.add_row(
        "throughput",
        f"{wording.number(rates.output_tokens_per_s)} output tokens/s, "
        f"{wording.number(rates.prompt_tokens_per_s)} prompt tokens/s, {_rate(rates.answered_rps)}",
    )
    if report.classes:
        share = wording.attained(report.goodput, counts.measured)
        table.add_row("goodput", f"{_rate(report.goodput.goodput_rps)}, {share}")
    return table


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{wording.number(value)} req/s"


def _table(first: str, *columns: str) -> Table:
    table = Table(first, box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _latency(report: Report) -> Table:
    table = _table("\nlatency", *("\n" + name for name in ("mean", "p50", "p90", "p95", "p99", "max")))
    for name, summary in report.latency_ms.items():
        if summary is not None:
            values = (summary.mean, summary.p50, summary.p90, summary.p95, summary.p99, summary.max)
            table.add_row(name.upper(), *map(wording.milliseconds, values))
    return table


def _classes(report: Report) -> Table:
    table = _table("\nclass", "\nrequests", "\nattained", "\ngoodput")
    table.add_column("\nSLO")
    for item in report.classes:
        share, rate = wording.percent(item.attained_frac), _rate(item.goodput_rps)
        table.add_row(escape(item.slo_class), str(item.requests), share, rate, wording.slo(item.slo))
    return table


def _errors(report: Report) -> Table:
    table = _table("\nlost by error", "\nrequests")
    for code, count in report.requests.errors.items():
        table.add_row(escape(code), str(count), style="red")
    return table
