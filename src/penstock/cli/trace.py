"""`penstock trace`: look at a workload trace, and turn it into our request log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from penstock.workloads.describe import Description, Group

TraceArgument = Annotated[
    str, typer.Argument(metavar="TRACE", help="A trace file (.gz and .xz too), or `sample:burstgpt1`.")
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="`burstgpt`, `azure`, `mooncake` or `jsonl`; detected when absent."),
]
SortOption = Annotated[bool, typer.Option("--sort", help="Mend rows that are out of time order.")]
SpreadOption = Annotated[
    float, typer.Option("--spread-s", min=0, help="Spread rows that share a stamp over so many seconds.")
]
WindowOption = Annotated[str, typer.Option("--window", help="START:END in trace time, for example `1h:90m`.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows.")]
RateScaleOption = Annotated[
    float, typer.Option("--rate-scale", help="Arrivals per second times X; think times stay.")
]
TimeScaleOption = Annotated[
    float, typer.Option("--time-scale", help="Run X trace seconds in one, think times too.")
]
DivisorOption = Annotated[float, typer.Option("--length-divisor", help="Divide prompt and output lengths.")]

_EXAMPLES = """\n\nExamples:

    penstock trace describe sample:burstgpt1

    penstock trace describe conversation_trace.jsonl.gz --json

    penstock trace convert sample:burstgpt3 out.jsonl --to jsonl --window 0:1h --length-divisor 4
"""


def register(app: typer.Typer) -> None:
    """Hang `trace` and its commands on the program."""
    group = typer.Typer(
        help="Describe and convert workload traces." + _EXAMPLES,
        no_args_is_help=True,
        rich_markup_mode="markdown",
    )
    group.command("describe", help="Show rates, lengths, sessions and prefix reuse of a trace.")(describe)
    group.command("convert", help="Write a trace, cut and scaled, as a Penstock request log.")(convert)
    app.add_typer(group, name="trace")


def describe(
    trace: TraceArgument,
    format: FormatOption = None,
    sort: SortOption = False,
    window: WindowOption = ":",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    from penstock.workloads.describe import describe as describe_rows
    from penstock.workloads.shape import Shape, ShapeCounts, parse_window, shaped
    from penstock.workloads.source import ReadOptions, open_trace

    source = open_trace(trace, ReadOptions(format, sort))
    shape = Shape(window=parse_window(window))
    description = describe_rows(source if window == ":" else shaped(source, shape, ShapeCounts()))
    if as_json:
        print(json.dumps({"trace": source.name, "format": source.format.name} | description.to_json()))
    else:
        _print_description(source.name, source.format.name, description)


def convert(
    trace: TraceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; `.gz` compresses.")],
    to: Annotated[str, typer.Option("--to", help="Format to write: `jsonl`, our request log.")] = "jsonl",
    format: FormatOption = None,
    sort: SortOption = False,
    spread_s: SpreadOption = 0.0,
    window: WindowOption = ":",
    limit: LimitOption = None,
    rate_scale: RateScaleOption = 1.0,
    time_scale: TimeScaleOption = 1.0,
    length_divisor: DivisorOption = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    from penstock.workloads.convert import write_request_log
    from penstock.workloads.shape import Shape, ShapeCounts, parse_window, shaped
    from penstock.workloads.source import ReadOptions, open_trace

    if to != "jsonl":
        raise ConfigError(f"`--to {to[:40]}` is not a format that can be written.", hint="write `--to jsonl`")
    source = open_trace(trace, ReadOptions(format, sort, spread_s))
    shape = Shape(parse_window(window), limit, rate_scale, time_scale, length_divisor)
    counts = ShapeCounts()
    rows = write_request_log(shaped(source, shape, counts), out)
    if as_json:
        print(json.dumps({"rows": rows, "failed": counts.failed, "out": str(out)}))
    else:
        print(f"wrote {rows} rows ({counts.failed} failed ones among them) to {out}")


def _print_description(name: str, format_name: str, found: Description) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{name}  ({format_name})", style="bold", markup=False)
    for label, value in _facts(found):
        console.print(f"  {label:<22}{value}", markup=False, soft_wrap=True)
    _print_lengths(console, found)
    for title, groups in (
        ("model", found.models),
        ("class", found.slo_classes),
        ("tenant", found.tenants),
    ):
        if len(groups) > 1:
            _print_groups(console, title, groups)


def _facts(found: Description) -> list[tuple[str, str]]:
    facts = [
        ("rows", f"{found.rows}, of them {found.failed} failed"),
        ("span", f"{found.span_s:.1f} s ({found.span_s / 3600:.2f} h)"),
        ("rate", _number(found.rate_rps, "requests/s")),
        ("gap between arrivals", _number(found.interarrival_mean_s, "s on average")),
        ("burstiness", f"{_number(found.interarrival_cv)} CV of the gaps (Poisson: 1)"),
        (
            "Fano factor",
            ", ".join(f"{_number(value)} at {width} s" for width, value in found.fano.items())
            + " (Poisson: 1)",
        ),
        ("prompt × output", f"{_number(found.length_correlation)} correlation"),
    ]
    if found.sessions:
        facts += _session_facts(found)
    if found.prefix:
        bound = " at least" if found.prefix.is_lower_bound else ""
        facts.append(
            (
                "prefix reuse",
                f"{found.prefix.hit_blocks_frac:.1%} of {found.prefix.blocks} blocks and "
                f"{found.prefix.hit_tokens_frac:.1%} of tokens{bound}, with an infinite cache",
            )
        )
    return facts


def _session_facts(found: Description) -> list[tuple[str, str]]:
    assert found.sessions
    sessions = found.sessions
    facts = [("sessions", f"{sessions.sessions}, {sessions.turns_mean:.1f} turns (max {sessions.turns_max})")]
    if sessions.think_gaps:
        what = "gap between turns" if sessions.think_is_gap else "think time"
        p50, p95 = _number(sessions.think_s_p50), _number(sessions.think_s_p95)
        facts.append(
            (what, f"p50 {p50} s, p95 {p95} s ({sessions.think_gaps} gaps, {sessions.overlaps} overlaps)")
        )
    return facts


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.4g} {unit}".rstrip()


def _print_lengths(console: Console, found: Description) -> None:
    from rich.table import Table

    table = Table("tokens", box=None, header_style="dim", pad_edge=False)
    for column in ("mean", "p5", "p50", "p90", "p95", "p99", "max"):
        table.add_column(column, justify="right")
    for label, lengths in (("prompt", found.prompt), ("output", found.output)):
        if lengths:
            shown = (
                lengths.mean,
                lengths.p5,
                lengths.p50,
                lengths.p90,
                lengths.p95,
                lengths.p99,
                lengths.max,
            )
            table.add_row(label, *(f"{value:.0f}" for value in shown))
    console.print()
    console.print(table)


def _print_groups(console: Console, title: str, groups: list[Group]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title, box=None, header_style="dim", pad_edge=False)
    for column in ("requests", "failed", "prompt tokens", "output tokens"):
        table.add_column(column, justify="right")
    for group in groups[:12]:
        counts = (group.requests, group.failed, group.prompt_tokens, group.output_tokens)
        table.add_row(escape(group.name), *map(str, counts))
    console.print()
    console.print(table)
    if len(groups) > 12:
        console.print(f"  … and {len(groups) - 12} more, all in `--json`", markup=False)
