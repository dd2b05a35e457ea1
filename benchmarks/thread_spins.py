"""Step times over how long idle threads spin, alone and beside a neighbour (`benchmarks.threads --spins`).

libgomp reads its settings when torch is loaded, so each setting is a process of its own. Within it the three
conditions alternate, and the settings alternate over the rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

SPINS = (0, 300, 1000, 3000, 10_000, 100_000)
CONDITIONS = {"idle": 0.0, "half busy": 0.5, "busy": 1.0}  # share of one core that the neighbour takes
ROWS = (16, 64)
STEPS = 40  # of each round, condition and number of rows
ROUNDS = 3
SLICE_S = 0.005
SETTLE_S = 0.5  # until the neighbour is at work

_NEIGHBOUR = """
import sys, time
share, slice_s = map(float, sys.argv[1:])
while True:
    until_s = time.perf_counter() + share * slice_s
    while time.perf_counter() < until_s:
        pass
    if share < 1:
        time.sleep((1 - share) * slice_s)
"""

Step = Callable[[int], float]  # rows → seconds of one decode step on all threads


def spin_table(rounds: int = ROUNDS) -> list[str]:
    """Median and P90 milliseconds of a decode step, as lines of Markdown. Runs the workers."""
    found: dict[tuple[int, str, int], list[float]] = {}
    for number in range(rounds):
        for spins in SPINS:
            for condition, rows, steps_ms in _worker(spins):
                found.setdefault((spins, condition, rows), []).extend(steps_ms)
            print(f"round {number}, GOMP_SPINCOUNT={spins} done", flush=True)
    columns = [(rows, condition) for rows in ROWS for condition in CONDITIONS]
    heads = [f"{rows} rows, {condition}" for rows, condition in columns]
    lines = [
        "Milliseconds of a decode step on all threads, median / P90, alone and beside a neighbour process:",
        "",
        "| `GOMP_SPINCOUNT` | " + " | ".join(heads) + " |",
        "| ---: |" + " ---: |" * len(columns),
    ]
    for spins in SPINS:
        cells = []
        for rows, condition in columns:
            steps_ms = sorted(found[spins, condition, rows])
            cells.append(f"{median(steps_ms):.1f} / {steps_ms[int(0.9 * len(steps_ms))]:.1f}")
        lines.append(f"| {spins} | " + " | ".join(cells) + " |")
    return lines


def _worker(spins: int) -> list[tuple[str, int, list[float]]]:
    settings = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(spins)}
    command = [sys.executable, "-m", "benchmarks.threads", "--spin-worker"]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, check=True, text=True)
    found: list[tuple[str, int, list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(step: Step) -> None:
    """In a process of one setting: prints its times as JSON."""
    found = []
    for condition, share in CONDITIONS.items():
        with neighbour(share):
            for rows in ROWS:
                step(rows)
                found.append((condition, rows, [1e3 * step(rows) for _ in range(STEPS)]))
    print(json.dumps(found))


@contextmanager
def neighbour(share: float) -> Iterator[None]:
    """A process that keeps one core busy for a share of each slice of time; none for 0."""
    if not share:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR, str(share), str(SLICE_S)])
    time.sleep(SETTLE_S)
    try:
        yield
    finally:
        process.kill()
        process.wait()
