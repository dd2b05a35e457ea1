"""`penstock calibrate`: measure this machine's engine into a profile for the twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.settings import ConfigOption, read_settings

if TYPE_CHECKING:
    from penstock.core.settings import Settings
    from penstock.twin.costs.tables import Sample

_HELP = """Measure this machine's engine on a grid of steps, and fit the twin's cost model to it.

Takes a few minutes; do nothing else on the machine meanwhile."""

_EPILOG = """Examples:

    penstock calibrate

    penstock calibrate --out laptop.toml --rounds 5

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
    from_steps: Annotated[
        Path | None, typer.Option(help="Fit a step trace of `serve --step-trace` instead of measuring.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The profile to write.")] = Path("calibrated.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the fit's errors as JSON.")] = False,
) -> None:
    from penstock.twin.costs.tables import fit_steps

    if from_steps is None:
        settings = read_settings(config, {"model": model, "replica.threads": threads}).settings
        samples, name, source = _measured(settings, rounds)
    else:
        samples, name, source = _recorded(from_steps)
    fitted = fit_steps(samples, name=name, source=source)
    fitted.save(out)
    errors = fitted.profile.errors
    if as_json:
        print(json.dumps({kind: {"median": e.median, "p90": e.p90} for kind, e in errors.items()}))
        return
    for kind, error in errors.items():
        print(f"{kind:<8} error: median {error.median:.1%}, p90 {error.p90:.1%}")
    print(f"profile: {out}")


def _measured(settings: Settings, rounds: int) -> tuple[list[Sample], str, str]:
    """Steps of this machine's engine, made for the purpose; with the profile's name and source."""
    from penstock.engine.threads import wait_briefly

    wait_briefly()  # as the engine process does
    from rich.console import Console
    from rich.progress import Progress

    from penstock.cli.model import show_progress
    from penstock.engine.build import Stages, build_engine
    from penstock.engine.calibrate import measure
    from penstock.models.catalogue import resolve
    from penstock.twin.costs.recorded import work_of

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
    return samples, f"{info.model} on {info.device}", told


def _recorded(path: Path) -> tuple[list[Sample], str, str]:
    """The same of steps that a server recorded while it worked."""
    from penstock.twin.costs.recorded import read_samples

    samples = read_samples(path)
    return samples, f"recorded {path.name}", f"penstock calibrate --from-steps: {len(samples)} steps"
