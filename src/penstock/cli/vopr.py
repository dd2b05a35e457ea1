"""`penstock vopr`: deterministic fault simulation of the whole system from one number."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.core.errors import ConfigError

if TYPE_CHECKING:
    from penstock.twin.vopr import RunResult, Script

_HELP = """Draw a system, a load and faults from SEED, run them, and check that nothing goes wrong.

The real desk, policies and replica run in virtual time while an executor that checks every byte of KV stalls,
crashes and runs out of memory, and clients leave. A failure is shrunk to a short script that replays it."""

_EPILOG = """Examples:

    penstock vopr 7

    penstock vopr 1 --runs 10000 --out failed.json

    penstock vopr 1 --until-failure --time-limit-s 600

    penstock vopr --script failed.json
"""

_SEED_MAX = (1 << 63) - 1
_FOREVER = 1 << 62
_EVERY_THOROUGH = 10  # of several seeds, one in so many runs twice and without leaps


def register(app: typer.Typer) -> None:
    app.command("vopr", help=_HELP, epilog=_EPILOG)(vopr)


def vopr(
    seed: Annotated[
        int | None, typer.Argument(min=0, max=_SEED_MAX, help="Everything is drawn from it.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=_FOREVER, help="Seeds from SEED upwards.")] = 1,
    until_failure: Annotated[
        bool, typer.Option("--until-failure", help="Go on until a check fails, or the time is over.")
    ] = False,
    time_limit_s: Annotated[
        float, typer.Option(min=0, help="Begin no run after so many seconds; 0: no limit.")
    ] = 0.0,
    script: Annotated[Path | None, typer.Option(help="Replay a script that an earlier failure left.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where a failing script goes; else `vopr-SEED.json`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    from penstock.twin.vopr.script_file import read_script

    if (seed is None) == (script is None):
        raise ConfigError("Give a SEED or a `--script`, and not both", hint="For example: `penstock vopr 7`")
    if script is not None:
        _run_one(read_script(script), out, as_json, is_replay=True)
        return
    assert seed is not None
    last = min(_SEED_MAX, seed + (_FOREVER if until_failure else runs) - 1)
    if last == seed:
        from penstock.twin.vopr import draw_script

        _run_one(draw_script(seed), out, as_json, is_replay=False)
    else:
        _run_many(range(seed, last + 1), time_limit_s, out, as_json)


def _run_one(script: Script, out: Path | None, as_json: bool, *, is_replay: bool) -> None:
    """One script: its parameters first, so that they are there whatever happens then."""
    from penstock.twin.vopr import run_checked

    if not as_json:
        _print_script(script)
    result = run_checked(script, thoroughly=True)
    if result.failure is None:
        _say(
            {"ok": True, "seed": script.seed, "digest": result.digest, **_facts(result)},
            f"ok: {_counts(result)}\ndigest: {result.digest}",
            as_json,
        )
        return
    written = None if is_replay and out is None else _shrink(script, result, True, out)
    _tell_failure(script.seed, result, written, as_json)


def _run_many(seeds: range, time_limit_s: float, out: Path | None, as_json: bool) -> None:
    """Seed after seed, until one fails."""
    from rich.console import Console
    from rich.progress import Progress

    from penstock.twin.vopr import draw_script, run_checked

    began_s, done, totals = time.monotonic(), 0, dict[str, int]()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        known = None if len(seeds) >= _FOREVER // 2 else len(seeds)
        task = progress.add_task("runs", total=known)
        for seed in seeds:
            if time_limit_s and time.monotonic() - began_s > time_limit_s:
                break
            script = draw_script(seed)
            if not as_json:
                print(f"seed {seed}: {_short(script)}", flush=True)
            thoroughly = done % _EVERY_THOROUGH == 0
            result = run_checked(script, thoroughly=thoroughly)
            done += 1
            if result.failure is not None:
                progress.stop()
                written = _shrink(script, result, thoroughly, out)
                _tell_failure(seed, result, written, as_json, runs=done)
            for name, count in _facts(result).items():
                totals[name] = totals.get(name, 0) + count
            progress.update(task, completed=done, description=f"seed {seed}")
    _say({"ok": True, "runs": done, **totals}, f"ok: {done} runs; {_listed(totals)}", as_json)


def _shrink(script: Script, result: RunResult, thoroughly: bool, out: Path | None) -> Path:
    """Write the shortest script that fails in the same check."""
    from rich.console import Console

    from penstock.twin.vopr import shrink
    from penstock.twin.vopr.script_file import write_script

    assert result.failure is not None
    path = out or Path(f"vopr-{script.seed}.json")
    write_script(script, path)  # first as it is: a shrinker that is interrupted loses nothing
    console = Console(stderr=True)
    with console.status("shrinking") as status:
        short = shrink(
            script,
            result.failure.check,
            thoroughly=thoroughly,
            on_progress=lambda runs, best: status.update(f"shrinking: run {runs}, {_sizes(best)}"),
        )
    write_script(short, path)
    console.print(f"shrunk from {_sizes(script)} to {_sizes(short)}", markup=False)
    return path


def _tell_failure(
    seed: int, result: RunResult, written: Path | None, as_json: bool, *, runs: int = 1
) -> None:
    """Say which check failed, and leave with exit code 1."""
    failure = result.failure
    assert failure is not None
    facts = {
        "ok": False,
        "seed": seed,
        "runs": runs,
        "check": failure.check,
        "message": failure.message,
        "last": list(failure.last_lines),
        "script": None if written is None else str(written),
    }
    lines = ["the last happenings:", *(f"  {line}" for line in failure.last_lines)]
    lines += [f"FAILED with seed {seed}: {failure.check}", failure.message]
    if written is not None:
        lines.append(f"replay it: penstock vopr --script {written}")
    _say(facts, "\n".join(lines), as_json)
    raise typer.Exit(1)


def _say(facts: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else text)


def _print_script(script: Script) -> None:
    from dataclasses import asdict

    print(f"seed: {script.seed}")
    for name, value in asdict(script.system).items():
        print(f"  {name}: {value}")
    for call in script.calls:
        print(f"  {call}")
    for fault in script.faults:
        print(f"  {fault.kind.value} at {fault.at_s:.4f} s{_details(fault.seconds, fault.target)}")
    print(flush=True)


def _details(seconds: float, target: str) -> str:
    return (f" for {seconds:.4f} s" if seconds else "") + (f" of {target}" if target else "")


def _short(script: Script) -> str:
    """Every drawn parameter of the system, and the mix, in one line."""
    from collections import Counter
    from dataclasses import asdict

    system = " ".join(f"{name}={value}" for name, value in asdict(script.system).items())
    mix = Counter(fault.kind.value for fault in script.faults)
    faults = " ".join(f"{kind}x{count}" for kind, count in sorted(mix.items()))
    return f"{system} calls={len(script.calls)} faults: {faults or 'none'}"


def _sizes(script: Script) -> str:
    return f"{len(script.calls)} calls, {len(script.faults)} faults"


def _facts(result: RunResult) -> dict[str, int]:
    return {
        "requests": result.requests,
        **result.ends,
        "steps": result.steps,
        "preemptions": result.preemptions,
        "restarts": result.restarts,
        "engine_deaths": int(result.is_dead),
    }


def _counts(result: RunResult) -> str:
    return _listed(_facts(result))


def _listed(facts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in facts.items())
