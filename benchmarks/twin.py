"""Simulated requests per CPU second of the twin, on workload W.

    python -m benchmarks.twin [--requests 10000 100000] [--replicas 1 16 256] [--write]

W: Azure conversation lengths (2023, ../shared/data), Poisson arrivals of 6.45 requests/s a replica, a model
of Llama-3-8B's shape on one A100, steps of 512 tokens. The whole twin runs: desk, policies, KV accounting of
every block, outcomes with every token's instant. Time is this process's CPU time, reading the trace included;
memory is the process's peak. Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.effects.serving import AZURE, LLAMA_3_8B, azure_lengths
from benchmarks.results import describe_machine, write_section
from penstock.core.metrics import RequestOutcome
from penstock.core.settings import Settings
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs.hardware import load_engine, load_hardware
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec
from penstock.twin.simulate import simulate
from penstock.workloads.trace import TraceRow

RATE_RPS = 6.45
BLOCK_TOKENS = 16
CONTEXT_LEN = 16_384


@dataclass(frozen=True)
class Measured:
    requests: int
    replicas: int
    cpu_s: float
    peak_mib: float
    steps: int
    plans: int
    ttft_p50_s: float
    ttft_p99_s: float

    @property
    def requests_per_cpu_s(self) -> float:
        return self.requests / self.cpu_s


def rows(requests: int, replicas: int) -> Iterator[TraceRow]:
    """Lengths in the trace's order, again and again; arrivals of one seed."""
    arrivals, known, now_s = random.Random("arrivals/1"), azure_lengths(), 0.0
    for index in range(requests):
        now_s += arrivals.expovariate(RATE_RPS * replicas)
        yield TraceRow(now_s, *known[index % len(known)])


def measure(requests: int, replicas: int) -> Measured:
    cost = RooflineCostModel(ModelSpec.of(LLAMA_3_8B), load_hardware("a100-80g"), load_engine("vllm-2025"))
    limits = ReplicaLimits(cost.kv_tokens_max() // BLOCK_TOKENS, BLOCK_TOKENS, 256, 512, CONTEXT_LEN)
    ttft_s: list[float] = []

    def keep(outcome: RequestOutcome) -> None:
        if outcome.ttft_s is not None:
            ttft_s.append(outcome.ttft_s)

    began_s = time.process_time()
    fleet = simulate(rows(requests, replicas), Settings(), limits, cost, keep, replicas=replicas)
    cpu_s = time.process_time() - began_s
    assert len(ttft_s) == requests, "every request was answered"
    ttft_s.sort()
    return Measured(
        requests,
        replicas,
        cpu_s,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        sum(twin.executor.steps for twin in fleet),
        sum(twin.replica.steps_planned for twin in fleet),
        ttft_s[len(ttft_s) // 2],
        ttft_s[len(ttft_s) * 99 // 100],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not AZURE.exists():
        sys.exit("skipped: the Azure trace in ../shared/data is not on this machine")
    if arguments.one:
        print(json.dumps(asdict(measure(arguments.requests[0], arguments.replicas[0]))))
        return
    cases = [(count, 1) for count in arguments.requests]
    cases += [(max(10_000, 100 * n), n) for n in arguments.replicas if n > 1]
    found = [_apart(requests, replicas) for requests, replicas in cases]
    table = _table(found)
    print(table)
    if arguments.write:
        command = " ".join(["python -m benchmarks.twin", *sys.argv[1:]])
        write_section("twin", f"{describe_machine()}\n\n`{command}`\n\n{table}")


def _apart(requests: int, replicas: int) -> Measured:
    command = [sys.executable, "-m", "benchmarks.twin", "--one"]
    command += ["--requests", str(requests), "--replicas", str(replicas)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Measured(**json.loads(done.stdout))


def _table(found: list[Measured]) -> str:
    lines = [
        "| requests | replicas | requests per CPU s | µs a request | steps a request | plans a request "
        "| peak MiB | TTFT p50 / p99, s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for m in found:
        lines.append(
            f"| {m.requests} | {m.replicas} | {m.requests_per_cpu_s:.0f} | {1e6 / m.requests_per_cpu_s:.0f} "
            f"| {m.steps / m.requests:.1f} | {m.plans / m.requests:.1f} | {m.peak_mib:.0f} "
            f"| {m.ttft_p50_s:.3f} / {m.ttft_p99_s:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
