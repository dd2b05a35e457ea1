"""How far the twin is from this machine, on three real traces: `penstock fidelity`, one after the other.

    python -m benchmarks.fidelity [--profile FILE] [--requests 250] [--repeat 2] [--write]

The profile is calibrated on a load of its own, never on these traces: the errors are of runs it has not seen.
With `--repeat` the machine's own spread over the replays stands beside each error.
The traces lie in ../shared/data and are left out with a word where absent. Lengths are divided so that
they fit a model of 8,192 tokens of context, and each load takes at most a few minutes on two cores. Do
nothing else on the machine. `--write` renews the fidelity section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.effects.serving import DATA
from benchmarks.results import describe_machine, write_section
from benchmarks.server_process import PENSTOCK
from penstock.twin.fidelity import METRICS, STATISTICS

LOADS = "0.5,0.8,1.0"


@dataclass(frozen=True)
class Case:
    """One trace and what is done to it. Divided Mooncake blocks of 512 tokens are KV blocks of 16."""

    name: str
    file: str
    flags: tuple[str, ...]


CASES = (
    Case(
        "BurstGPT, compressed",
        "burstgpt/burstgpt1_first400.csv",
        ("--length-divisor", "4", "--max-prompt-tokens", "1000", "--max-output-tokens", "200"),
    ),
    Case(
        "Azure conversation 2023",
        "azure_llm/AzureLLMInferenceTrace_conv_2023.csv.gz",
        ("--length-divisor", "6", "--max-prompt-tokens", "1000", "--max-output-tokens", "120"),
    ),
    Case(
        "Mooncake conversation",
        "mooncake/conversation_trace.jsonl.gz",
        ("--length-divisor", "32", "--spread-s", "3", "--max-prompt-tokens", "2000"),
    ),
)


def run_case(case: Case, profile: Path, requests: int, repeat: int) -> dict[str, Any]:
    """The JSON of one `penstock fidelity`; what it says on the way goes to stderr."""
    command = [*PENSTOCK, "fidelity", str(DATA / case.file), "--profile", str(profile), "--loads", LOADS]
    command += ["--preset", "sarathi", "--limit", str(requests), "--repeat", str(repeat)]
    command += [*case.flags, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def table(found: dict[str, dict[str, Any]]) -> str:
    """One row a trace, load and metric: live value and error of each statistic."""
    lines = ["| trace | load | req/s | metric | " + " | ".join(STATISTICS) + " |"]
    lines.append("| --- | ---: | ---: | --- | " + " | ".join("---:" for _ in STATISTICS) + " |")
    for name, result in found.items():
        for regime in result["regimes"]:
            head = f"| {name} | {regime['load']:.0%} | {regime['requested_rps']:.2f} | "
            for metric in METRICS:
                cells = [_cell(regime["errors"].get(metric, {}).get(each)) for each in STATISTICS]
                lines.append(head + f"{metric.upper()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def worst(found: dict[str, dict[str, Any]]) -> str:
    """The largest error below saturation and at it, over P50 and P99 of all metrics, in one sentence."""
    sides: dict[str, list[float]] = {"below saturation": [], "at it": []}
    for result in found.values():
        for regime in result["regimes"]:
            side = "below saturation" if regime["load"] < 1 else "at it"
            for statistics in regime["errors"].values():
                sides[side] += [
                    abs(statistics[each]["error_frac"]) for each in ("p50", "p99") if each in statistics
                ]
    said = [f"{max(errors):.1%} {side}" for side, errors in sides.items() if errors]
    return f"Largest error of a P50 or P99: {', '.join(said)}."


def _cell(error: dict[str, float] | None) -> str:
    if error is None:
        return "-"
    spread = "" if error["spread_frac"] is None else f" ±{error['spread_frac']:.1%}"
    return f"{error['live_ms']:.0f} ms{spread} ({error['error_frac']:+.1%})"


def calibrate(folder: Path) -> Path:
    path = folder / "calibrated.toml"
    subprocess.run([*PENSTOCK, "calibrate", "--served", "--out", str(path)], stdout=sys.stderr, check=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path, help="a profile of this machine; else it is calibrated first")
    parser.add_argument("--requests", type=int, default=250, help="of each trace")
    parser.add_argument("--repeat", type=int, default=2, help="replays of each load")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    cases = [case for case in CASES if (DATA / case.file).exists()]
    for case in set(CASES) - set(cases):
        print(f"{case.name}: left out, {case.file} is not there")
    if not cases:
        return
    with tempfile.TemporaryDirectory() as folder:
        profile = arguments.profile or calibrate(Path(folder))
        found = {case.name: run_case(case, profile, arguments.requests, arguments.repeat) for case in cases}
    notes = [f"- {name}: {note}" for name, result in found.items() for note in result["notes"]]
    body = "\n\n".join(filter(None, (table(found), worst(found), "\n".join(notes))))
    print(body)
    if arguments.write:
        command = "python -m benchmarks.fidelity"
        command += f" --requests {arguments.requests} --repeat {arguments.repeat} --write"
        write_section("fidelity", f"{describe_machine()}\n\n`{command}`\n\n{body}")


if __name__ == "__main__":
    main()
