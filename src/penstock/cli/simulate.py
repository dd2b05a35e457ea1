"""`penstock simulate`: what `replay` would have measured, without the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.machine import (
    OUTPUT,
    AskedOption,
    CapOption,
    ClosedLoopOption,
    E2eOption,
    EngineOption,
    HardwareOption,
    KvOption,
    OutputMaxOption,
    ParallelOption,
    PromptMaxOption,
    ReplicasOption,
    RunningOption,
    StepOption,
    TpotOption,
    TtftOption,
    WarmupOption,
    trace_notes,
)
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
    from penstock.twin.simulate import Clients
    from penstock.workloads.report import Report
    from penstock.workloads.shape import Shape
    from penstock.workloads.source import Trace

_HELP = """Serve a trace in the twin: the same desk, policies and KV accounting, on modelled time.

Reads the config of `serve` and the trace of `replay`, and writes the same report."""

_EPILOG = """Examples:

    penstock simulate sample:burstgpt1 --time-scale 200 --hardware cpu-2core

    penstock simulate conversation.csv --model hf:meta-llama/Llama-3.1-8B --hardware h100-sxm --replicas 4

    penstock simulate yesterday.jsonl --config penstock.toml --preset vllm-v0 --out report
"""


def register(app: typer.Typer) -> None:
    app.command("simulate", help=_HELP, epilog=_EPILOG)(simulate)


def simulate(
    trace: TraceArgument,
    config: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As in `serve`; only its configuration is read.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A named policy stack.")] = None,
    hardware: HardwareOption = "cpu-2core",
    engine: EngineOption = "penstock-cpu",
    tensor_parallel: ParallelOption = 1,
    replicas: ReplicasOption = 1,
    kv_memory: KvOption = None,
    running_max: RunningOption = None,
    step_tokens: StepOption = None,
    format: FormatOption = None,
    sort: SortOption = False,
    spread_s: SpreadOption = 0.0,
    window: WindowOption = ":",
    limit: LimitOption = None,
    rate_scale: RateScaleOption = 1.0,
    time_scale: TimeScaleOption = 1.0,
    warmup_s: WarmupOption = 0.0,
    closed_loop: ClosedLoopOption = False,
    concurrency_max: CapOption = None,
    asked_tokens: AskedOption = None,
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
) -> None:
    from penstock.core.metrics import Slo
    from penstock.models.catalogue import resolve_config
    from penstock.twin.build import limits_of, machine_of
    from penstock.twin.costs.spec import Parallel
    from penstock.twin.feasible import infeasible_targets, look_at
    from penstock.twin.simulate import Clients
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
    model_config = resolve_config(settings.model)
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
    facts, easiest = look_at(shaped(rows, shape, ShapeCounts()), limits)
    slo = Slo(slo_ttft_ms or None, slo_tpot_ms or None, slo_e2e_ms or None)
    slos = settings.slo or dict.fromkeys(easiest, slo)
    hopeless = [str(each) for each in infeasible_targets(easiest, slos, settings, limits, machine)]
    for sentence in hopeless:
        print(f"infeasible: {sentence}", file=sys.stderr)
    counts = ShapeCounts()
    outcomes: list[RequestOutcome] = []
    clients = Clients(closed_loop, rate_scale, concurrency_max, asked_tokens)
    fleet = run_twin(
        shaped(rows, shape, counts),
        settings,
        limits,
        machine.cost,
        outcomes.append,
        replicas=replicas,
        path=machine.path,
        clients=clients,
    )
    out_of_range = sum(twin.executor.steps_out_of_range for twin in fleet)
    notes = [*hopeless, *trace_notes(machine, facts, out_of_range)]
    report = _report(rows.name, _configuration(rows, shape, settings, machine, fleet, clients), fleet,
                     outcomes, slos, warmup_s, notes, machine.power_status)  # fmt: skip
    _show(report, outcomes, out, as_json)


def _configuration(
    trace: Trace,
    shape: Shape,
    settings: Settings,
    machine: Machine,
    fleet: Sequence[TwinReplica],
    clients: Clients,
) -> dict[str, Any]:
    limits = fleet[0].replica.limits
    return {
        "trace": trace.name,
        "machine": machine.name,
        "model": settings.model,
        "replicas": len(fleet),
        "rate_scale": shape.rate_scale,
        "time_scale": shape.time_scale,
        "length_divisor": shape.length_divisor,
        "loop": "closed" if clients.closed_loop else "open",
        "concurrency_max": clients.concurrency_max,
        "asked_tokens": clients.asked_tokens,
        **{f"policies.{slot}": name for slot, name in settings.policies.names().items()},
        "kv_blocks": limits.kv_blocks,
        "running_max": limits.running_max,
        "step_tokens": limits.step_tokens_max,
        "steps": sum(twin.executor.steps for twin in fleet),
    }


def _report(
    title: str,
    configuration: dict[str, Any],
    fleet: list[TwinReplica],
    outcomes: Sequence[RequestOutcome],
    slos: dict[str, Slo],
    warmup_s: float,
    notes: list[str],
    power_status: str,
) -> Report:
    from penstock.twin.simulate import series_of
    from penstock.workloads.report import Energy, Report, ReportInput

    joules = sum(twin.executor.busy_joules for twin in fleet)  # 0 where the profile knows no power
    busy_s = sum(twin.executor.busy_s for twin in fleet)
    return Report.build(
        ReportInput(
            kind="simulate",
            title=title,
            outcomes=outcomes,
            slos=slos,
            warmup_s=warmup_s,
            server=series_of(fleet),
            configuration=configuration,
            notes=notes,
            energy=Energy.of(joules, busy_s, outcomes, power_status) if joules else None,
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
