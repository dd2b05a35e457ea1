"""`penstock calibrate`: measure this machine's engine into a profile for the twin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.output import check_output
from penstock.cli.settings import ConfigOption, read_settings
from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from penstock.core.settings import Settings
    from penstock.twin.costs.tables import FittedCostModel

_HELP = """Measure this machine's engine, and fit the twin's cost model to its steps.

By itself on a grid of steps, or with `--served` behind a gateway with clients that stream, whose work takes
part of the machine. Takes a few minutes; do nothing else on the machine meanwhile."""

_EPILOG = """Examples:

    penstock calibrate

    penstock calibrate --served --out laptop.toml

    penstock calibrate --from-steps steps.jsonl --out yesterday.toml

    penstock simulate sample:burstgpt1 --time-scale 200 --hardware laptop.toml
"""


def register(app: typer.Typer) -> None:
    app.command("calibrate", help=_HELP, epilog=_EPILOG)(calibrate)


def calibrate(
    config: ConfigOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As in `serve`.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the engine; 0 takes every core.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Times over the grid.")] = 3,
    served: Annotated[
        bool, typer.Option("--served", help="Measure a server of one's own while clients stream from it.")
    ] = False,
    from_steps: Annotated[
        Path | None, typer.Option(help="Fit a step trace of `serve --step-trace` instead of measuring.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The profile to write.")] = Path("calibrated.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the fit's errors as JSON.")] = False,
) -> None:
    from penstock.twin.costs.knee import knee_tokens

    if served and from_steps is not None:
        raise ConfigError("`--served` and `--from-steps` are two sources of steps.", hint="give one of them")
    check_output(out)
    settings = read_settings(config, {"model": model, "replica.threads": threads}).settings
    if served:
        fitted = served_profile(settings, config, model, threads)
    elif from_steps is not None:
        fitted = _recorded(from_steps)
    else:
        fitted = _measured(settings, rounds)
    fitted.save(out)
    errors = fitted.profile.errors
    knee = knee_tokens(fitted, fitted.profile.range.rows)
    if as_json:
        told = {kind: {"median": error.median, "p90": error.p90} for kind, error in errors.items()}
        print(json.dumps({**told, "knee_tokens": knee}))
        return
    for kind, error in errors.items():
        print(f"{kind:<8} error: median {error.median:.1%}, p90 {error.p90:.1%}")
    print(f"knee: {knee} tokens a step reach 90% of the best throughput")
    print(f"profile: {out}")


def _measured(settings: Settings, rounds: int) -> FittedCostModel:
    """From steps of this machine's engine, made for the purpose."""
    from penstock.engine.threads import wait_briefly

    wait_briefly()  # as the engine process does
    from rich.console import Console
    from rich.progress import Progress

    from penstock.cli.model import show_progress
    from penstock.engine.build import Stages, build_engine
    from penstock.engine.calibrate import measure
    from penstock.models.catalogue import resolve
    from penstock.twin.costs.recorded import work_of
    from penstock.twin.costs.tables import fit_steps

    with show_progress() as report:
        source = resolve(settings.model, progress=report)
    engine = build_engine(settings, source, source.name, Stages())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring steps", total=None)
        records = measure(
            engine.executor,
            engine.limits,
            rounds,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    samples = [(work_of(record), record.total_s) for record in records]
    info = engine.info
    told = f"penstock calibrate: {len(samples)} steps, {info.dtype}, {info.fingerprint}"
    return fit_steps(samples, name=f"{info.model} on {info.device}", source=told)


def served_profile(
    settings: Settings, config: Path | None, model: str | None, threads: int | None
) -> FittedCostModel:
    """From steps of a server of one's own, gone when this returns, while clients stream from it."""
    import tempfile

    from penstock.cli.load import send_rows
    from penstock.cli.local_server import local_server
    from penstock.models.catalogue import resolve
    from penstock.models.config import load_config
    from penstock.twin.costs.calibration_load import phases
    from penstock.twin.costs.recorded import read_samples
    from penstock.twin.costs.tables import fit_steps
    from penstock.workloads.replay import ReplayOptions

    given = {"--config": config, "--model": model, "--threads": threads}
    flags = [word for key, value in given.items() if value is not None for word in (key, str(value))]
    vocab_size = load_config(resolve(settings.model)).vocab
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        trace = Path(folder) / "steps.jsonl"
        with local_server([*flags, "--step-trace", str(trace)]) as server:
            info = server.info
            plan = phases(server.limits(settings.replica.prefix_cache))
            for index, phase in enumerate(plan):
                print(f"calibrating: {phase.clients} clients, {len(phase.rows)} requests", file=sys.stderr)
                options = ReplayOptions(seed=index, concurrency_max=phase.clients)
                send_rows(server.url, phase.rows, options, vocab_size)
        samples = read_samples(trace)
    told = f"penstock calibrate --served: {len(samples)} steps, {info['dtype']}"
    return fit_steps(samples, name=f"{info['model']} on {info['device']}, served", source=told, is_lived=True)


def _recorded(path: Path) -> FittedCostModel:
    """From steps that a server recorded while it worked."""
    from penstock.twin.costs.recorded import read_samples
    from penstock.twin.costs.tables import fit_steps

    samples = read_samples(path)
    told = f"penstock calibrate --from-steps: {len(samples)} steps"
    return fit_steps(samples, name=f"recorded {path.name}", source=told, is_lived=True)
