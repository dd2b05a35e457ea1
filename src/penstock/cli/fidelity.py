"""`penstock fidelity`: replay and simulate the same trace on this machine, and show the error."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.calibrate import served_profile
from penstock.cli.load import send_rows
from penstock.cli.local_server import local_server
from penstock.cli.machine import (
    LOAD,
    MACHINE,
    OUTPUT,
    ClosedLoopOption,
    KvOption,
    OutputMaxOption,
    PromptMaxOption,
    RunningOption,
    StepOption,
)
from penstock.cli.settings import ConfigOption, read_settings
from penstock.cli.trace import (
    DivisorOption,
    FormatOption,
    LimitOption,
    SortOption,
    SpreadOption,
    TimeScaleOption,
    TraceArgument,
    WindowOption,
)
from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from penstock.core.metrics import RequestOutcome
    from penstock.core.settings import Settings
    from penstock.replica.limits import ReplicaLimits
    from penstock.twin.build import Machine
    from penstock.twin.fidelity import Fidelity, Regime
    from penstock.workloads.replay import ReplayRun
    from penstock.workloads.trace import TraceRow

_HELP = """Replay a trace on this machine and simulate the same rows, and report the twin's error per load.

Without `--url` a server is started and ended; without `--profile` its engine is calibrated first.
Do nothing else on the machine meanwhile."""

_EPILOG = """Examples:

    penstock fidelity sample:burstgpt1 --length-divisor 4 --profile laptop.toml

    penstock fidelity conversation.csv --length-divisor 6 --loads 0.5,0.8,1.0 --limit 250 --out report
"""

ROWS_DEFAULT = 300
ROWS_MAX = 20_000  # hours of serving on a small machine
BURST_REQUESTS = 96
REGIMES_MAX = 12
REQUEST_TIMEOUT_S = 600.0


def register(app: typer.Typer) -> None:
    app.command("fidelity", help=_HELP, epilog=_EPILOG)(fidelity)


def fidelity(
    trace: TraceArgument,
    url: Annotated[
        str | None, typer.Option(help="A server that runs already; otherwise one is started.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A profile by `calibrate` of this machine.", rich_help_panel=MACHINE),
    ] = None,
    config: ConfigOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As in `serve`.")] = None,
    preset: Annotated[str | None, typer.Option(help="A named policy stack.")] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of the engine; 0 takes every core.", rich_help_panel=MACHINE),
    ] = None,
    kv_memory: KvOption = None,
    running_max: RunningOption = None,
    step_tokens: StepOption = None,
    loads: Annotated[
        str, typer.Option(help="Shares of the capacity, which is measured first.", rich_help_panel=LOAD)
    ] = "0.5,0.8,1.0",
    rate_scales: Annotated[
        str | None,
        typer.Option(help="Multiples of the trace's rate instead of `--loads`.", rich_help_panel=LOAD),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            min=1, max=10, help="Replays of each load, to see the machine's own spread.", rich_help_panel=LOAD
        ),
    ] = 1,
    closed_loop: ClosedLoopOption = False,
    warmup_s: Annotated[
        float,
        typer.Option(
            min=0,
            help="Leave the first seconds of each load out, at most a fifth of its requests.",
            rich_help_panel=LOAD,
        ),
    ] = 2.0,
    format: FormatOption = None,
    sort: SortOption = False,
    spread_s: SpreadOption = 0.0,
    window: WindowOption = ":",
    limit: LimitOption = None,
    time_scale: TimeScaleOption = 1.0,
    length_divisor: DivisorOption = 1.0,
    max_prompt_tokens: PromptMaxOption = None,
    max_output_tokens: OutputMaxOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts' contents.", rich_help_panel=LOAD)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for fidelity.json.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    from penstock.workloads.shape import Shape, ShapeCounts, parse_window, shaped
    from penstock.workloads.source import ReadOptions, open_trace

    regimes = parse_numbers("--rate-scales", rate_scales) if rate_scales else parse_numbers("--loads", loads)
    flags = {
        "model": model,
        "preset": preset,
        "replica.threads": threads,
        "replica.kv_memory": kv_memory,
        "replica.running_max": running_max,
        "replica.step_tokens": step_tokens,
    }
    settings = read_settings(config, flags).settings
    rows_max = min(limit or ROWS_DEFAULT, ROWS_MAX)
    shape = Shape(
        parse_window(window), rows_max, 1.0, time_scale, length_divisor, max_prompt_tokens, max_output_tokens
    )
    source = open_trace(trace, ReadOptions(format, sort, spread_s))
    rows = [row for row in shaped(source, shape, ShapeCounts()) if not row.failed]
    with contextlib.ExitStack() as stack:
        path = profile or _calibrated(stack, settings, config, threads)
        machine, own_limits, vocab_size = _twin_of(path, settings)
        server = None if url else stack.enter_context(local_server(_serve_arguments(config, flags)))
        limits = own_limits if server is None else server.limits(settings.replica.prefix_cache)
        job = _Job(
            rows=rows,
            settings=settings,
            machine=machine,
            limits=limits,
            url=url or (server.url if server else ""),
            closed_loop=closed_loop,
            warmup_s=warmup_s,
            seed=seed,
            vocab_size=vocab_size,
            repeat=repeat,
        )
        capacity, found = job.run(regimes, is_loads=rate_scales is None)
    configuration = {
        "trace": source.name,
        "model": settings.model,
        "profile": path.name,
        "requests": len(rows),
        "time_scale": time_scale,
        "length_divisor": length_divisor,
        "loop": "closed" if closed_loop else "open",
        "warmup_s": warmup_s,
        "seed": seed,
        "repeat": repeat,
        "kv_blocks": limits.kv_blocks,
        "running_max": limits.running_max,
        "step_tokens": limits.step_tokens_max,
    }
    _show(_result(source.name, machine, capacity, found, configuration, server is None), out, as_json)


def parse_numbers(flag: str, text: str) -> list[float]:
    """`0.5,0.8,1.0`. Raises ConfigError naming the flag."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= REGIMES_MAX or not all(1e-3 <= number <= 1e6 for number in numbers):
        raise ConfigError(
            f"`{flag} {text[:60]}` is not a list of numbers.",
            hint=f"write 1 to {REGIMES_MAX} positive numbers, for example `0.5,0.8,1.0`",
        )
    return numbers


def _serve_arguments(config: Path | None, flags: dict[str, Any]) -> list[str]:
    """The same settings for the server's process."""
    given = {} if config is None else {"config": config}
    given |= {key.removeprefix("replica."): value for key, value in flags.items() if value is not None}
    return [word for key, value in given.items() for word in ("--" + key.replace("_", "-"), str(value))]


def _calibrated(
    stack: contextlib.ExitStack, settings: Settings, config: Path | None, threads: int | None
) -> Path:
    """Measure behind a gateway and clients, as the replays will."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-"))
    path = Path(folder) / "calibrated.toml"
    print("calibrating first; `--profile` spares that", file=sys.stderr)
    served_profile(settings, config, settings.model, threads).save(path)
    return path


def _twin_of(path: Path, settings: Settings) -> tuple[Machine, ReplicaLimits, int]:
    """The machine, the sizes that `serve` would choose, and the model's vocabulary."""
    from penstock.models.catalogue import resolve
    from penstock.models.config import load_config
    from penstock.twin.build import limits_of, machine_of
    from penstock.twin.costs.spec import Parallel

    model_config = load_config(resolve(settings.model))
    machine = machine_of(str(path), "penstock-cpu", model_config, Parallel())
    return machine, limits_of(settings, model_config, machine), model_config.vocab


@dataclass(slots=True)
class _Job:
    """The same rows through the server and through the twin. Every replay has prompts of its own."""

    rows: Sequence[TraceRow]
    settings: Settings
    machine: Machine
    limits: ReplicaLimits
    url: str
    closed_loop: bool
    warmup_s: float
    seed: int
    vocab_size: int
    repeat: int
    replays: int = 0

    def run(self, regimes: Sequence[float], *, is_loads: bool) -> tuple[float | None, list[Regime]]:
        """The capacity where it was measured, and one regime a number."""
        from penstock.twin.feasible import look_at
        from penstock.twin.fidelity import capacity_rps, trace_rps

        look_at(self.rows, self.limits)
        base_rps = trace_rps(self.rows)
        burst = self._replay([_at_once(row) for row in self.rows[:BURST_REQUESTS]], 1.0, False)
        if not is_loads:  # the burst has warmed the server up all the same
            return None, [self._regime(None, scale) for scale in regimes]
        capacity = capacity_rps([exchange.outcome for exchange in burst.exchanges])
        print(f"capacity: {capacity:.2f} requests/s", file=sys.stderr)
        return capacity, [self._regime(load, load * capacity / base_rps) for load in regimes]

    def _regime(self, load: float | None, rate_scale: float) -> Regime:
        from penstock.twin import fidelity as results
        from penstock.workloads.replay_report import lag_ms

        scaled = results.at_rate(self.rows, rate_scale)
        requested_rps, warmup_s = results.trace_rps(scaled), results.warmup_end_s(scaled, self.warmup_s)
        print(f"{len(scaled)} requests at {requested_rps:.2f} requests/s", file=sys.stderr)
        runs = [self._replay(scaled, rate_scale, self.closed_loop) for _ in range(self.repeat)]
        lives = [results.measured([each.outcome for each in run.exchanges], warmup_s) for run in runs]
        outcomes, out_of_range = self._simulate(scaled, rate_scale)
        twin = results.measured(outcomes, warmup_s)
        lags_ms = [lag.p99 for run in runs if (lag := lag_ms(run)) is not None]
        return results.Regime(
            load=load,
            rate_scale=rate_scale,
            requested_rps=requested_rps,
            requests=len(lives[0]),
            live_answered=min(sum(outcome.is_answered for outcome in live) for live in lives),
            twin_answered=sum(outcome.is_answered for outcome in twin),
            live_output_tokens_per_s=sum(map(results.output_rate, lives)) / len(lives),
            twin_output_tokens_per_s=results.output_rate(twin),
            lag_p99_ms=max(lags_ms, default=None),
            out_of_range=out_of_range,
            errors=results.errors_between(lives, twin),
        )

    def _replay(self, rows: Sequence[TraceRow], rate_scale: float, closed_loop: bool) -> ReplayRun:
        from penstock.workloads.replay import ReplayOptions

        self.replays += 1
        options = ReplayOptions(
            seed=self.seed + 1000 * self.replays,  # else the prefix cache would know the prompts
            closed_loop=closed_loop,
            rate_scale=rate_scale,
            timeout_s=REQUEST_TIMEOUT_S,
        )
        return send_rows(self.url, rows, options, self.vocab_size)

    def _simulate(self, rows: Sequence[TraceRow], rate_scale: float) -> tuple[list[RequestOutcome], int]:
        from penstock.twin.simulate import Clients, simulate

        outcomes: list[RequestOutcome] = []
        clients = Clients(self.closed_loop, rate_scale)
        fleet = simulate(
            rows, self.settings, self.limits, self.machine.cost, outcomes.append, clients=clients
        )
        return outcomes, sum(twin.executor.steps_out_of_range for twin in fleet)


def _at_once(row: TraceRow) -> TraceRow:
    from dataclasses import replace

    return replace(row, arrival_s=0.0)


def _result(
    title: str,
    machine: Machine,
    capacity: float | None,
    regimes: list[Regime],
    configuration: dict[str, Any],
    is_foreign: bool,
) -> Fidelity:
    from penstock.twin.fidelity import Fidelity

    return Fidelity(
        title=title,
        profile=machine.name,
        step_error_frac=machine.cost.relative_error,
        capacity_rps=capacity,
        regimes=regimes,
        configuration=configuration,
        notes=list(_notes(regimes, is_foreign)),
    )


def _notes(regimes: Sequence[Regime], is_foreign: bool) -> Iterator[str]:
    """What to know before believing the numbers."""
    if is_foreign:
        yield "the server at `--url` was not asked for its sizes; the twin took those of the settings"
    for regime in regimes:
        lost = regime.requests - regime.live_answered
        if lost or regime.live_answered != regime.twin_answered:
            twin_lost = regime.requests - regime.twin_answered
            yield f"{regime.name}: {lost} requests were lost live, {twin_lost} in the twin"
        if regime.lag_p99_ms is not None and regime.lag_p99_ms > 100:
            yield f"{regime.name}: the client itself was {regime.lag_p99_ms:.0f} ms late at p99"
        if regime.out_of_range:
            yield f"{regime.name}: {regime.out_of_range} times a step went beyond the profile's range"


def _show(result: Fidelity, out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from penstock.twin.fidelity import markdown
    from penstock.workloads.report_files import write_texts

    if out is not None:
        document = json.dumps(result.to_json(), indent=1, allow_nan=False)
        write_texts(out, {"fidelity.json": [document, "\n"]})
    if as_json:
        print(json.dumps(result.to_json(), allow_nan=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{result.title}: live → twin in ms, and the twin's error", style="bold", markup=False)
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    console.print(markdown(result), markup=False)
    console.print(f"a step's own error by the profile: ±{result.step_error_frac:.1%}", markup=False)
