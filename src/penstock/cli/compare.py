"""`penstock compare`: policy stacks side by side in the twin."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.machine import (
    LOAD,
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
from penstock.core.errors import ConfigError, TraceError

if TYPE_CHECKING:
    from penstock.core.metrics import Slo
    from penstock.core.settings import Settings
    from penstock.replica.limits import ReplicaLimits
    from penstock.twin.build import Machine
    from penstock.twin.compare.document import Comparison
    from penstock.twin.compare.run import Bench, Contender, Run
    from penstock.twin.compare.stacks import StackSpec
    from penstock.twin.feasible import Easiest, TraceFacts
    from penstock.workloads.shape import Shape
    from penstock.workloads.source import Trace
    from penstock.workloads.trace import TraceRow

_HELP = """Serve a trace under several policy stacks in the twin, at rates up to saturation.

A stack is a preset, a preset with slots changed (`sarathi+compose=prefill-first`), or slots alone
(`rank=fcfs`), on top of the config. The first stack is the one that the others are held against."""

_EPILOG = """Examples:

    penstock compare sample:burstgpt1 --time-scale 200 --length-divisor 4 --stacks sarathi,vllm-v0

    penstock compare yesterday.jsonl --stacks sarathi,sarathi+rank=fcfs --rates 0.5,1,2 --out report
"""

RATES_GIVEN_MAX = 32
TABLE_COLUMNS = 130  # a narrower terminal wraps the lines of the table, not its cells
ROWS_MAX = 2_000_000  # outcomes of two stacks are held at a time, about 1 KB each


def register(app: typer.Typer) -> None:
    app.command("compare", help=_HELP, epilog=_EPILOG)(compare)


def compare(
    trace: TraceArgument,
    stacks: Annotated[str, typer.Option("--stacks", help="Comma separated, for example `sarathi,vllm-v0`.")],
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates",
            help="Multiples of the trace's rate; searched up to saturation when absent.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    config: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As in `serve`; only its configuration is read.")
    ] = None,
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
        typer.Option(help="Folder for compare.html and compare.json.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as JSON.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    from penstock.core.metrics import Slo
    from penstock.models.catalogue import resolve_config
    from penstock.twin.build import limits_of, machine_of
    from penstock.twin.compare.run import Bench
    from penstock.twin.compare.stacks import parse_stacks
    from penstock.twin.costs.spec import Parallel
    from penstock.twin.feasible import look_at
    from penstock.workloads.shape import Shape, parse_window
    from penstock.workloads.source import ReadOptions, open_trace

    specs, chosen_rates = parse_stacks(stacks), parse_rates(rates)
    flags = {
        "model": model,
        "replica.kv_memory": kv_memory,
        "replica.running_max": running_max,
        "replica.step_tokens": step_tokens,
    }
    base = read_settings(config, flags).settings
    chosen = [(spec.name, _settings_of(spec, config, flags)) for spec in specs]
    model_config = resolve_config(base.model)
    machine = machine_of(hardware, engine, model_config, Parallel(tensor=tensor_parallel))
    load = _Load(
        open_trace(trace, ReadOptions(format, sort, spread_s)),
        Shape(
            parse_window(window),
            limit,
            rate_scale,
            time_scale,
            length_divisor,
            max_prompt_tokens,
            max_output_tokens,
        ),
    )
    slo = Slo(slo_ttft_ms or None, slo_tpot_ms or None, slo_e2e_ms or None)
    sized = [(name, settings, limits_of(settings, model_config, machine)) for name, settings in chosen]
    facts, easiest = look_at(load.rows(1.0), sized[0][2])
    given = base.slo or dict.fromkeys(easiest, slo)
    slos = {name: target for name, target in given.items() if name in easiest}
    contenders = _contenders(sized, machine, easiest, slos)
    bench = Bench(
        rows=load.rows,
        slos=slos,
        rate_scale=rate_scale,
        replicas=replicas,
        closed_loop=closed_loop,
        concurrency_max=concurrency_max,
        asked_tokens=asked_tokens,
        warmup_s=warmup_s,
    )
    configuration = {
        "machine": machine.name,
        "model": base.model,
        "trace": load.trace.name,
        "requests": facts.rows,
        "trace_rps": facts.rate_rps,
        "replicas": replicas,
        "rate_scale": rate_scale,
        "time_scale": time_scale,
        "length_divisor": length_divisor,
        "warmup_s": warmup_s,
        "loop": "closed" if closed_loop else "open",
        "concurrency_max": concurrency_max,
        "asked_tokens": asked_tokens,
    }
    comparison = _compared(bench, contenders, chosen_rates, machine, facts, configuration)
    _show(comparison, out, as_json)


def parse_rates(text: str | None) -> list[float] | None:
    """`0.5,1,2`, ascending and each once. Raises ConfigError."""
    if text is None:
        return None
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if not rates or len(rates) > RATES_GIVEN_MAX or not all(1e-6 <= rate <= 1e6 for rate in rates):
        raise ConfigError(
            f"`--rates {text[:60]}` is not a list of rates.",
            hint=f"write 1 to {RATES_GIVEN_MAX} numbers from 1e-6 to 1e6, for example `0.5,1,2,4`",
        )
    return rates


@dataclass(frozen=True, slots=True)
class _Load:
    """The trace, shaped, at any multiple of its rate; read anew each time."""

    trace: Trace
    shape: Shape

    def rows(self, rate: float) -> Iterator[TraceRow]:
        from dataclasses import replace

        from penstock.workloads.shape import ShapeCounts, shaped

        scaled = replace(self.shape, rate_scale=self.shape.rate_scale * rate)
        for index, row in enumerate(shaped(self.trace, scaled, ShapeCounts())):
            if index >= ROWS_MAX:
                raise TraceError(
                    f"the trace has more than {ROWS_MAX} rows.", hint="cut it with `--window` or `--limit`"
                )
            yield row


def _settings_of(spec: StackSpec, config: Path | None, flags: dict[str, Any]) -> Settings:
    """Raises ConfigError for an unknown preset or policy."""
    from penstock.policies.stack import make_stack_of

    given = {key: value for key, value in spec.flags().items() if value is not None}
    settings = read_settings(config, flags | given).settings
    make_stack_of(settings)
    return settings


def _contenders(
    sized: Sequence[tuple[str, Settings, ReplicaLimits]],
    machine: Machine,
    easiest: dict[str, Easiest],
    slos: dict[str, Slo],
) -> list[Contender]:
    """The stacks, and the targets that each can never meet. Raises SloInfeasible when none has a chance."""
    from penstock.twin.compare.run import Contender
    from penstock.twin.feasible import infeasible_targets, refuse_where_hopeless

    found = []
    for name, settings, limits in sized:
        targets = infeasible_targets(easiest, slos, settings, limits, machine)
        found.append(Contender(name, settings, limits, machine, tuple(targets)))
    hopeless = [each for each in found if each.is_hopeless(slos)]
    if len(hopeless) == len(found):
        refuse_where_hopeless(hopeless[0].infeasible, {each.slo_class for each in hopeless[0].infeasible})
    for each in hopeless:
        print(f"infeasible: stack `{each.name}` is left out: {each.infeasible[0]}", file=sys.stderr)
    return found


def _compared(
    bench: Bench,
    contenders: list[Contender],
    rates: list[float] | None,
    machine: Machine,
    facts: TraceFacts,
    configuration: dict[str, Any],
) -> Comparison:
    from penstock.twin.compare.document import Comparison, notes_of
    from penstock.twin.compare.run import sweep

    def tell(run: Run) -> None:
        attained = run.goodput.attained_frac
        print(f"{run.stack} at {run.rate:.3g}x: {attained:.0%} within the SLO", file=sys.stderr)

    runs = sweep(bench, [each for each in contenders if not each.is_hopeless(bench.slos)], rates, tell)
    return Comparison(
        title=str(configuration["trace"]),
        stacks=contenders,
        runs=runs,
        slos=bench.slos,
        configuration=configuration,
        notes=[*trace_notes(machine, facts), *notes_of(contenders, runs)],
    )


def _show(comparison: Comparison, out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from penstock.twin.compare.page import render
    from penstock.twin.compare.table import print_comparison
    from penstock.workloads.report_files import write_texts

    if out is not None:
        document = json.dumps(comparison.to_json(), indent=1, allow_nan=False)
        write_texts(out, {"compare.json": [document, "\n"], "compare.html": [render(comparison)]})
    if as_json:
        print(json.dumps(comparison.to_json(), allow_nan=False))
        return
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_COLUMNS)
    print_comparison(comparison, console)
    if out is not None:
        print(f"\npictures: {out / 'compare.html'}")
