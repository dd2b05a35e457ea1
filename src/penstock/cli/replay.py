"""`penstock replay`: send a recorded trace to a live server and report what it felt like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.machine import (
    LOAD,
    OUTPUT,
    ClosedLoopOption,
    E2eOption,
    OutputMaxOption,
    PromptMaxOption,
    TpotOption,
    TtftOption,
    WarmupOption,
)
from penstock.cli.trace import (
    DivisorOption,
    FormatOption,
    LimitOption,
    RateScaleOption,
    SortOption,
    SpreadOption,
    TimeScaleOption,
    TraceArgument,
    WindowOption,
)
from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from penstock.workloads.replay import ReplayOptions, ReplayRun
    from penstock.workloads.report import Report
    from penstock.workloads.shape import Shape
    from penstock.workloads.source import Trace
    from penstock.workloads.target import Endpoint

_HELP = """Send a trace to an OpenAI-compatible server and report latency, throughput and goodput.

Requests leave at their recorded instants whether or not earlier ones were answered (open loop).
Prompts have the exact token length of the trace, outputs too where the server honours `ignore_eos`.
Lost requests count as misses. Ctrl-C ends the run with a partial report."""

_EPILOG = """Examples:

    penstock replay sample:burstgpt1 --url http://127.0.0.1:8000 --time-scale 100 --limit 100

    penstock replay conversation_trace.jsonl.gz --spread-s 3 --window 0:10m --length-divisor 16

    penstock replay sample:burstgpt3 --closed-loop --time-scale 60 --out report --fail-on-loss
"""

_SERVER = "Server"


def register(app: typer.Typer) -> None:
    """Hang `replay` on the program."""
    app.command("replay", help=_HELP, epilog=_EPILOG)(replay)


def replay(
    trace: TraceArgument,
    url: Annotated[
        str, typer.Option("--url", help="Address of the server.", rich_help_panel=_SERVER)
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Model to ask for; the server's first.", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", help="Bearer key.", show_envvar=True, rich_help_panel=_SERVER),
    ] = None,
    endpoint: Annotated[
        str, typer.Option(help="`completions` or `chat`.", rich_help_panel=_SERVER)
    ] = "completions",
    text_prompts: Annotated[
        bool,
        typer.Option(
            "--text-prompts",
            help="Send text instead of token ids (chat always does).",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    standard_fields: Annotated[
        bool,
        typer.Option(
            "--standard-fields",
            help="Only fields OpenAI defines; outputs may then end early.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=16, help="Bound of prompt token ids; usually 31000.", rich_help_panel=_SERVER),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Give a request up after so long.", rich_help_panel=_SERVER)
    ] = 600.0,
    format: FormatOption = None,
    sort: SortOption = False,
    spread_s: SpreadOption = 0.0,
    window: WindowOption = ":",
    limit: LimitOption = None,
    rate_scale: RateScaleOption = 1.0,
    time_scale: TimeScaleOption = 1.0,
    warmup_s: WarmupOption = 0.0,
    closed_loop: ClosedLoopOption = False,
    concurrency_max: Annotated[
        int, typer.Option(min=1, max=65536, help="Most requests in flight.", rich_help_panel=LOAD)
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the prompts' contents.", rich_help_panel=LOAD)] = 0,
    length_divisor: DivisorOption = 1.0,
    max_prompt_tokens: PromptMaxOption = None,
    max_output_tokens: OutputMaxOption = None,
    slo_ttft_ms: TtftOption = 1000.0,
    slo_tpot_ms: TpotOption = 100.0,
    slo_e2e_ms: E2eOption = 0.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, report.json and requests.jsonl.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress.", rich_help_panel=OUTPUT)] = False,
    fail_on_loss: Annotated[
        bool,
        typer.Option("--fail-on-loss", help="Exit with 1 when any request was lost.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    from penstock.core.metrics import Slo
    from penstock.workloads.replay import ReplayOptions
    from penstock.workloads.shape import Shape, parse_window
    from penstock.workloads.source import ReadOptions, open_trace
    from penstock.workloads.target import base_url_of

    job = _Job(
        trace=open_trace(trace, ReadOptions(format, sort, spread_s)),
        shape=Shape(
            parse_window(window),
            limit,
            rate_scale,
            time_scale,
            length_divisor,
            max_prompt_tokens,
            max_output_tokens,
        ),
        base_url=base_url_of(url),
        model=model,
        api_key=api_key,
        endpoint=_endpoint_of(endpoint),
        vocab_size=vocab_size,
        warmup_s=warmup_s,
        quiet=quiet,
        options=ReplayOptions(
            seed=seed,
            closed_loop=closed_loop,
            rate_scale=rate_scale,
            concurrency_max=_affordable_connections(concurrency_max),
            timeout_s=timeout_s,
            text_prompts=text_prompts,
            standard_fields=standard_fields,
            slo=Slo(slo_ttft_ms or None, slo_tpot_ms or None, slo_e2e_ms or None),
        ),
    )
    report, run = asyncio.run(job.run())
    _finish(report, run, out, as_json)
    if run.stopped_early or (fail_on_loss and (report.requests.lost or not report.requests.answered)):
        raise typer.Exit(1)


def _endpoint_of(text: str) -> Endpoint:
    if text == "completions":
        return "completions"
    if text == "chat":
        return "chat"
    raise ConfigError(f"`--endpoint {text[:40]}` is unknown.", hint="it is `completions` or `chat`")


def _affordable_connections(wanted: int) -> int:
    """As many sockets as the process may open, once the soft limit is raised to the hard one."""
    try:
        import resource
    except ImportError:  # not a POSIX system: there is no such limit to ask for
        return wanted
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    soft = min(ceiling, wanted + 256)
    if soft > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128))


@dataclass(frozen=True, slots=True)
class _Job:
    """One replay as the command line asked for it."""

    trace: Trace
    shape: Shape
    base_url: str
    model: str | None
    api_key: str | None
    endpoint: Endpoint
    vocab_size: int | None
    warmup_s: float
    quiet: bool
    options: ReplayOptions

    async def run(self) -> tuple[Report, ReplayRun]:
        from dataclasses import replace

        from penstock.workloads.progress import choose_progress
        from penstock.workloads.replay import replay as replay_rows
        from penstock.workloads.replay_report import report_of_run
        from penstock.workloads.shape import ShapeCounts, shaped
        from penstock.workloads.target import find_target, open_client

        started = datetime.now(UTC)
        counts = ShapeCounts()
        rows = shaped(self.trace, self.shape, counts)
        async with open_client(self.base_url, self.api_key, self.options.concurrency_max + 8) as client:
            target = await find_target(client, self.base_url, self.model, self.endpoint)
            target = replace(target, vocab_size=self.vocab_size or target.vocab_size)
            stop = _stop_on_interrupt()
            run = await replay_rows(rows, client, target, self.options, choose_progress(self.quiet), stop)
        report = report_of_run(
            run,
            title=self.trace.name,
            slo=self.options.slo,
            warmup_s=self.warmup_s,
            shaping=counts,
            configuration=self._configuration(target.model, started),
        )
        return report, run

    def _configuration(self, model: str, started: datetime) -> dict[str, Any]:
        """Everything needed to run it again. No key."""
        window = self.shape.window
        end = "" if math.isinf(window.end_s) else f"{window.end_s:g}"
        return {
            "trace": self.trace.name,
            "format": self.trace.format.name,
            "url": self.base_url,
            "model": model,
            "endpoint": self.endpoint,
            "created_utc": started.strftime("%Y-%m-%d %H:%M UTC"),
            "window_s": f"{window.start_s:g}:{end}",
            "limit": self.shape.limit,
            "rate_scale": self.shape.rate_scale,
            "time_scale": self.shape.time_scale,
            "spread_s": self.trace.options.spread_s,
            "length_divisor": self.shape.length_divisor,
            "max_prompt_tokens": self.shape.prompt_tokens_max,
            "max_output_tokens": self.shape.output_tokens_max,
            "loop": "closed" if self.options.closed_loop else "open",
            "concurrency_max": self.options.concurrency_max,
            "timeout_s": self.options.timeout_s,
            "standard_fields": self.options.standard_fields,
            "seed": self.options.seed,
        }


def _stop_on_interrupt() -> asyncio.Event:
    """Set by the first Ctrl-C; the second one ends the program at once, as the first does on Windows."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    with contextlib.suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, interrupt)
    return stop


def _finish(report: Report, run: ReplayRun, out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from penstock.workloads.report_files import write_files
    from penstock.workloads.report_table import print_report

    if out is not None:
        sent_s = [exchange.sent_s for exchange in run.exchanges]
        write_files(report, [exchange.outcome for exchange in run.exchanges], sent_s, out)
    if as_json:
        print(json.dumps(report.to_json(), allow_nan=False))
        return
    print_report(report, Console(highlight=False))
    if out is not None:
        print(f"\nreport: {out / 'report.html'}")
