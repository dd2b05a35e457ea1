"""Every preset, and stacks that combine mechanisms of several papers, on one mixture of real traces.

    python -m benchmarks.stacks [--seeds 1 2 3] [--rates 0.1,0.2,0.4] [--write]

benchmarks/mixed_trace.py makes the mixture (agents, chats, reports), benchmarks/mixed.toml holds what they
were promised. Llama-3-8B's shape on one A10, by the roofline; every request asks for 1,024 tokens and ends
where the recorded one did; sessions go on once they are answered. The share of requests that met all of their
targets, mean over the seeds. Runs `penstock compare`; virtual time, the same numbers everywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.mixed_trace import CHATS, GAPS, REPORTS
from benchmarks.results import describe_machine, write_section
from benchmarks.server_process import PENSTOCK
from penstock.policies.stack import preset_names
from penstock.twin.compare.stacks import STACKS_MAX

HERE = Path(__file__).parent
SESSIONS = 30
COMBINED = (
    "jitserve+admit=past-future",
    "jitserve+admit=past-future+compose=ms-budget",
    "jitserve+admit=past-future+compose=splitfuse",
)
# It prices a GPU's kernels that run side by side, and takes minutes on this trace; it serves offline jobs.
LEFT_OUT = ("nanoflow",)


def attained(trace: Path, stacks: list[str], rates: str) -> dict[str, list[float]]:
    """Stack → share of requests within their targets, by rate."""
    found: dict[str, list[float]] = {}
    for first in range(0, len(stacks), STACKS_MAX):
        command = [*PENSTOCK, "compare", str(trace), "--stacks", ",".join(stacks[first : first + STACKS_MAX])]
        command += ["--closed-loop", "--asked-tokens", "1024", "--config", str(HERE / "mixed.toml")]
        command += ["--model", str(HERE / "models" / "llama-3-8b"), "--hardware", "a10"]
        command += ["--engine", "vllm-2025", "--rates", rates, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for run in json.loads(done.stdout)["runs"]:
            found.setdefault(run["stack"], []).append(run["goodput"]["attained_frac"])
    return found


def table(found: dict[str, list[list[float]]], rates: list[str]) -> str:
    """One row a stack, best mean first."""
    lines = ["| stack | " + " | ".join(f"rate × {rate}" for rate in rates) + " | mean | worst seed |"]
    lines.append("| --- |" + " ---: |" * (len(rates) + 2))
    order = sorted(found, key=lambda name: -mean(mean(seed) for seed in found[name]))
    for name in order:
        by_rate = [mean(column) for column in zip(*found[name], strict=True)]
        seeds = [mean(seed) for seed in found[name]]
        cells = [f"{value:.1%}" for value in (*by_rate, mean(seeds), min(seeds))]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", default="0.1,0.2,0.4", help="multiples of the mixture's own arrivals")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    if not all(path.exists() for path in (GAPS, CHATS, REPORTS)):
        sys.exit("skipped: the traces of ../shared/data are not on this machine")
    stacks = [*(name for name in preset_names() if name not in LEFT_OUT), *COMBINED]
    found: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            trace = Path(folder) / f"mixed-{seed}.jsonl"
            command = [sys.executable, "-m", "benchmarks.mixed_trace", str(trace), "--seed", str(seed)]
            subprocess.run([*command, "--sessions", str(SESSIONS)], check=True, stdout=sys.stderr)
            for name, shares in attained(trace, stacks, arguments.rates).items():
                found.setdefault(name, []).append(shares)
    body = table(found, arguments.rates.split(","))
    print(body)
    if arguments.write:
        command_text = " ".join(["python -m benchmarks.stacks", *sys.argv[1:]])
        write_section("stacks", f"{describe_machine()}\n\n`{command_text}`\n\n{body}")


if __name__ == "__main__":
    main()
