"""`penstock simulate`: what `replay` would have measured, without the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.settings import ConfigOption, read_settings
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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.core.metrics import RequestOutcome, Slo
    from penstock.core.settings import Settings
    from penstock.twin.build import Machine
    from penstock.twin.replica import TwinReplica
    from penstock.workloads.report import Report
    from penstock.workloads.shape import Shape, ShapeCounts
    from penstock.workloads.source import Trace

_HELP = """Serve a trace in the twin: the same desk, policies and KV accounting, on modelled time.

Reads the config of `serve` and the trace of `replay`, and writes the same report."""

_EPILOG = """Examples:

    penstock simulate sample:burstgpt1 --time-scale 200 --hardware cpu-2core

    penstock simulate conversation.csv --model hf:meta-llama/Llama-3.1-8B --hardware h100-sxm --replicas 4

    penstock simulate yesterday.jsonl --config penstock.toml --preset vllm-v0 --out report
"""

_LOAD, _MACHINE, _SLO, _OUTPUT = "Load", "Machine", "SLO (0 turns a target off)", "Output"


def register(app: typer.Typer) -> None:
    app.command("simulate", help=_HELP, epilog=_EPILOG)(simulate)


def simulate(
    trace: TraceArgument,
    config: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As in `serve`; only its configuration is read.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A named policy stack.")] = None,
    hardware: Annotated[
        str, typer.Option(help="A shipped profile, or a file by `calibrate`.", rich_help_panel=_MACHINE)
    ] = "cpu-2core",
    engine: Annotated[
        str, typer.Option(help="Overheads of which engine.", rich_help_panel=_MACHINE)
    ] = "penstock-cpu",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Devices that share each layer.", rich_help_panel=_MACHINE)
    ] = 1,
    replicas: Annotated[
        int, typer.Option(min=1, max=4096, help="Dealt to in turn.", rich_help_panel=_MACHINE)
    ] = 1,
    kv_memory: Annotated[
        str | None, typer.Option(help="KV pool size, for example `2GiB`.", rich_help_panel=_MACHINE)
    ] = None,
    running_max: Annotated[
        int | None, typer.Option(help="Sequences that may run at once.", rich_help_panel=_MACHINE)
    ] = None,
    step_tokens: Annotated[
        int | None, typer.Option(help="Token budget of one step.", rich_help_panel=_MACHINE)
    ] = None,
    format: FormatOption = None,
    sort: SortOption = False,
    spread_s: SpreadOption = 0.0,
    window: WindowOption = ":",
    limit: LimitOption = None,
    rate_scale: RateScaleOption = 1.0,
    time_scale: TimeScaleOption = 1.0,
    warmup_s: Annotated[
        float, typer.Option(min=0, help="Leave the first seconds out.", rich_help_panel=_LOAD)
    ] = 0.0,
    length_divisor: DivisorOption = 1.0,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut longer prompts.", rich_help_panel=_LOAD)
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut longer outputs.", rich_help_panel=_LOAD)
    ] = None,
    slo_ttft_ms: Annotated[float, typer.Option(min=0, rich_help_panel=_SLO)] = 1000.0,
    slo_tpot_ms: Annotated[float, typer.Option(min=0, rich_help_panel=_SLO)] = 100.0,
    slo_e2e_ms: Annotated[float, typer.Option(min=0, rich_help_panel=_SLO)] = 0.0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, report.json and requests.jsonl.", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    from penstock.core.metrics import Slo
    from penstock.models.catalogue import resolve
    from penstock.models.config import load_config
    from penstock.twin.build import limits_of, machine_of
    from penstock.twin.costs.spec import Parallel
    from penstock.twin.simulate import simulate as run_twin
    from penstock.workloads.shape import Shape, ShapeCounts, parse_window, shaped
    from penstock.workloads.source import ReadOptions, open_trace

    settings = read_settings(
        config,
        {
            "model": model,
            "preset": preset,
            "replica.kv_memory": kv_memory,
            "replica.running_max": running_max,
            "replica.step_tokens": step_tokens,
        },
    ).settings
    model_config = load_config(resolve(settings.model))
    machine = machine_of(hardware, engine, model_config, Parallel(tensor=tensor_parallel))
    limits = limits_of(settings, model_config, machine)
    rows = open_trace(trace, ReadOptions(format, sort, spread_s))
    shape = Shape(
        parse_window(window),
        limit,
        rate_scale,
        time_scale,
        length_divisor,
        max_prompt_tokens,
        max_output_tokens,
    )
    counts = ShapeCounts()
    outcomes: list[RequestOutcome] = []
    fleet = run_twin(
        shaped(rows, shape, counts), settings, limits, machine.cost, outcomes.append, replicas=replicas
    )
    slo = Slo(slo_ttft_ms or None, slo_tpot_ms or None, slo_e2e_ms or None)
    report = _report(rows, shape, counts, settings, machine, fleet, outcomes, slo, warmup_s)
    _show(report, outcomes, out, as_json)


def _report(
    trace: Trace,
    shape: Shape,
    counts: ShapeCounts,
    settings: Settings,
    machine: Machine,
    fleet: Sequence[TwinReplica],
    outcomes: Sequence[RequestOutcome],
    slo: Slo,
    warmup_s: float,
) -> Report:
    from dataclasses import asdict

    from penstock.workloads.report import Report, ReportInput

    classes = {outcome.slo_class for outcome in outcomes}
    notes = [f"modelled: each step's time has an error of about ±{machine.cost.relative_error:.0%}"]
    beyond = sum(twin.executor.steps_out_of_range for twin in fleet)
    if beyond:
        notes.append(
            f"{beyond} times a step went beyond what the profile was calibrated on: less sure than stated"
        )
    if counts.failed:
        notes.append(f"{counts.failed} requests that failed in the trace were left out")
    configuration: dict[str, Any] = {
        "trace": trace.name,
        "machine": machine.name,
        "model": settings.model,
        "replicas": len(fleet),
        "rate_scale": shape.rate_scale,
        "time_scale": shape.time_scale,
        "length_divisor": shape.length_divisor,
        **{f"policies.{slot}": name for slot, name in asdict(settings.policies).items()},
        "kv_blocks": fleet[0].replica.limits.kv_blocks,
        "running_max": fleet[0].replica.limits.running_max,
        "step_tokens": fleet[0].replica.limits.step_tokens_max,
        "preemptions": sum(twin.replica.stats().preemptions_total for twin in fleet),
        "steps": sum(twin.executor.steps for twin in fleet),
    }
    return Report.build(
        ReportInput(
            kind="simulate",
            title=trace.name,
            outcomes=outcomes,
            slos=dict.fromkeys(classes, slo) if not settings.slo else settings.slo,
            warmup_s=warmup_s,
            configuration=configuration,
            notes=notes,
        )
    )


def _show(report: Report, outcomes: Sequence[RequestOutcome], out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from penstock.workloads.report_files import write_files
    from penstock.workloads.report_table import print_report

    if out is not None:
        write_files(report, outcomes, None, out)
    if as_json:
        print(json.dumps(report.to_json(), allow_nan=False))
        return
    print_report(report, Console(highlight=False))
    if out is not None:
        print(f"\nreport: {out / 'report.html'}")
