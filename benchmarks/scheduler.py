"""Microseconds that the replica spends deciding a step, without a model.

    python -m benchmarks.scheduler [--steps 2000] [--write]

`Replica.plan` and `Replica.complete` around an executor that answers every token at once. Three loads, at 1
to 256 running sequences: decode alone with plans that may stand (`repeat`), the same with every step planned
afresh, and a mix in which a new prompt enters, in chunks, whenever a sequence ends. Budget: 200 µs a step at
256 running sequences (the mean; what a step costs is proportional to what changes, so p99 shows the ends).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.results import describe_machine, write_section
from penstock.core.events import Finished
from penstock.core.request import Request
from penstock.core.settings import PolicySettings
from penstock.core.step import StepPlan, StepResult
from penstock.policies.stack import make_stack
from penstock.replica.limits import ReplicaLimits
from penstock.replica.replica import Replica

BUDGET_US, BUDGET_RUNNING = 200.0, 256
RUNNING = (1, 16, 64, 256)
BLOCK_TOKENS = 16
STEP_TOKENS = 512
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128  # of the mix
WARM_UP_STEPS = 50
TOKEN = 7


@dataclass(frozen=True)
class Load:
    name: str
    repeat: bool
    mixed: bool


LOADS = (
    Load("decode, plans stand", repeat=True, mixed=False),
    Load("decode, planned each step", repeat=False, mixed=False),
    Load("decode and chunked prefill", repeat=True, mixed=True),
)


@dataclass(frozen=True)
class Measured:
    """Per step, in microseconds."""

    mean_us: float
    p99_us: float


class InstantExecutor:
    """Answers `TOKEN` wherever the plan samples; knows of a sequence only whether it decodes."""

    def __init__(self) -> None:
        self._decoding: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for seq_id in plan.ends:
            self._decoding.pop(seq_id, None)
        tokens = dict(self._decoding) if plan.decode_count else {}
        for chunk in plan.chunks:
            if chunk.emits:
                tokens[chunk.seq_id] = self._decoding[chunk.seq_id] = TOKEN
        return StepResult(tokens)


def requests(load: Load, steps: int) -> Iterator[Request]:
    """Endless. Lengths are staggered, so that blocks do not fill, and sequences end, all at once."""
    for number in itertools.count():
        output_tokens = OUTPUT_TOKENS - number % 61 if load.mixed else steps * 2
        prompt_tokens = PROMPT_TOKENS if load.mixed else 2 + number % BLOCK_TOKENS
        # Distinct from the first block on: nothing is found in the prefix index, as in most traffic.
        prompt = [number % 50_000, number // 50_000, *range(prompt_tokens - 2)]
        yield Request(f"r{number}", prompt_tokens, output_tokens, 0.0, prompt_tokens=prompt)


def measure(load: Load, running: int, steps: int) -> Measured:
    replica = make_replica(load, running, steps)
    executor = InstantExecutor()
    source = requests(load, steps)
    for request in itertools.islice(source, running):
        replica.submit(request, 0.0)
    spent_s: list[float] = []
    # Collected before, not during: the pauses of a full collection would be the benchmark's own.
    gc.collect()
    gc.disable()
    try:
        while len(spent_s) < steps + WARM_UP_STEPS:
            began_s = time.perf_counter()
            plan = replica.plan(0.0)
            planned_s = time.perf_counter()
            assert plan is not None
            is_full = load.mixed or (plan.decode_count == running and not plan.chunks)
            result = executor.execute(plan)
            executed_s = time.perf_counter()
            events = replica.complete(plan, result, 0.0)
            replica.stats()
            done_s = time.perf_counter()
            if is_full:
                spent_s.append(planned_s - began_s + done_s - executed_s)
            for event in events:
                if isinstance(event, Finished):
                    replica.submit(next(source), 0.0)
    finally:
        gc.enable()
    spent_us = sorted(seconds * 1e6 for seconds in spent_s[WARM_UP_STEPS:])
    return Measured(sum(spent_us) / len(spent_us), spent_us[int(0.99 * len(spent_us))])


def make_replica(load: Load, running: int, steps: int) -> Replica:
    length = PROMPT_TOKENS + OUTPUT_TOKENS if load.mixed else 2 * steps + 2 + BLOCK_TOKENS
    limits = ReplicaLimits(
        kv_blocks=running * (length // BLOCK_TOKENS + 2),
        kv_block_tokens=BLOCK_TOKENS,
        running_max=running,
        step_tokens_max=STEP_TOKENS,
        context_len_max=length + 1,
        repeat=load.repeat,
    )
    return Replica(limits, make_stack(PolicySettings()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    found = {(load, count): measure(load, count, arguments.steps) for load in LOADS for count in RUNNING}
    table = _table(found)
    print(table)
    if arguments.write:
        command = f"python -m benchmarks.scheduler --steps {arguments.steps} --write"
        write_section("scheduler", f"{describe_machine()}\n\n`{command}`\n\n{table}")
    worst_us = max(found[load, BUDGET_RUNNING].mean_us for load in LOADS)
    return 0 if worst_us <= BUDGET_US else 1


def _table(found: dict[tuple[Load, int], Measured]) -> str:
    head = " | ".join(f"{count} running" for count in RUNNING)
    lines = [f"| µs a step: mean (p99) | {head} |", "| --- | " + " | ".join("---:" for _ in RUNNING) + " |"]
    for load in LOADS:
        cells = (found[load, count] for count in RUNNING)
        lines.append(
            f"| {load.name} | " + " | ".join(f"{m.mean_us:.0f} ({m.p99_us:.0f})" for m in cells) + " |"
        )
    lines.append(f"\nBudget at {BUDGET_RUNNING} running sequences: {BUDGET_US:.0f} µs.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
