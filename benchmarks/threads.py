"""From how many rows on a second thread pays, with threads that sleep between parallel regions.

    python -m benchmarks.threads [--spins] [--write]

Times steps of the embedded model on one thread and on all, interleaved, in this process: decodes of 1 to 64
sequences, and prompt chunks. `FEW_ROWS` of engine/threads.py is read off this table, made on an idle machine,
and off a run behind the gateway (docs/engine.md).
`--spins` adds a second table, from which `SPIN_COUNT` is read: step times over how long idle threads spin, on
an otherwise idle machine, beside a half busy and beside a fully busy neighbour process.
"""

from __future__ import annotations

import argparse
import os
from statistics import median

from benchmarks import thread_spins
from benchmarks.results import describe_machine, write_section
from penstock.engine.threads import Threads, wait_briefly

wait_briefly()  # before torch is loaded

from penstock.core.request import SamplingParams  # noqa: E402
from penstock.core.settings import Settings  # noqa: E402
from penstock.core.step import Chunk, SequenceStart, StepPlan  # noqa: E402
from penstock.engine.build import Stages, build_engine  # noqa: E402
from penstock.engine.executor import TorchExecutor  # noqa: E402
from penstock.models.catalogue import resolve  # noqa: E402

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
CHUNKS = (4, 8, 16, 32, 64, 128, 256, 512)
CONTEXT = 256
BLOCK_TOKENS = 16
REPEATS = 9
GREEDY = SamplingParams(temperature=0.0)


class FixedThreads(Threads):
    """The same count for every step, changed from outside."""

    def count_for(self, rows: int, most: int | None = None) -> int:
        return self.most


def decode_ms(executor: TorchExecutor, threads: FixedThreads, rows: int, most: int) -> tuple[float, float]:
    """Median milliseconds of a decode step on one thread and on `most`."""
    begin_decodes(executor, rows, REPEATS * 4)
    return _alternate(threads, most, lambda: executor.execute(StepPlan(0, [], rows)).duration_s)


def begin_decodes(executor: TorchExecutor, rows: int, steps: int) -> None:
    """`rows` sequences of `CONTEXT` tokens that may decode for `steps` steps."""
    executor.reset()
    per_sequence = (CONTEXT + steps) // BLOCK_TOKENS + 1
    starts = [
        SequenceStart(
            i, "", [7] * CONTEXT, CONTEXT, CONTEXT, CONTEXT - 1,
            tuple(range(i * per_sequence, (i + 1) * per_sequence)), GREEDY,
        )
        for i in range(rows)
    ]  # fmt: skip
    executor.execute(StepPlan(0, [Chunk(i, CONTEXT - 1, 1, True) for i in range(rows)], 0, starts=starts))


def chunk_ms(executor: TorchExecutor, threads: FixedThreads, rows: int, most: int) -> tuple[float, float]:
    """The same for a prompt's first `rows` tokens."""

    def step() -> float:
        executor.reset()
        start = SequenceStart(
            0, "", [7] * rows, rows, rows, 0, tuple(range(rows // BLOCK_TOKENS + 1)), GREEDY
        )
        return executor.execute(StepPlan(0, [Chunk(0, 0, rows, True)], 0, starts=[start])).duration_s

    return _alternate(threads, most, step)


def _alternate(threads: FixedThreads, most: int, step: object) -> tuple[float, float]:
    assert callable(step)
    seconds: dict[int, list[float]] = {1: [], most: []}
    for _ in range(REPEATS):
        for count in seconds:
            threads.most = count
            seconds[count].append(step())
    return 1e3 * median(seconds[1]), 1e3 * median(seconds[most])


def spin_worker() -> None:
    """The times of one setting, in this process."""
    most = len(os.sched_getaffinity(0))
    executor = _executor(FixedThreads(most), 2 * thread_spins.STEPS)
    begun = 0

    def step(rows: int) -> float:
        nonlocal begun
        if rows != begun:
            begin_decodes(executor, rows, 2 * thread_spins.STEPS)
            begun = rows
        return executor.execute(StepPlan(0, [], rows)).duration_s

    thread_spins.worker(step)


def _executor(threads: FixedThreads, steps: int) -> TorchExecutor:
    source = resolve("smollm2-135m-instruct")
    engine = build_engine(Settings(), source, source.name, Stages(), threads)
    engine.executor.fill_pages(max(ROWS) * ((CONTEXT + steps) // BLOCK_TOKENS + 4))
    return engine.executor


def table() -> list[str]:
    most = len(os.sched_getaffinity(0))
    threads = FixedThreads(most)
    executor = _executor(threads, REPEATS * 4)
    lines = [f"| step | rows | 1 thread, ms | {most} threads, ms |", "| --- | ---: | ---: | ---: |"]
    for kind, counts, run in (("decode", ROWS, decode_ms), ("chunk", CHUNKS, chunk_ms)):
        for rows in counts:
            one_ms, most_ms = run(executor, threads, rows, most)
            lines.append(f"| {kind} | {rows} | {one_ms:.1f} | {most_ms:.1f} |")
            print(lines[-1])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spins", action="store_true", help="also step times over GOMP_SPINCOUNT")
    parser.add_argument("--spin-worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.spin_worker:
        spin_worker()
        return
    parts = [table()]
    if arguments.spins:
        parts.append(thread_spins.spin_table())
        print("\n".join(parts[-1]))
    if arguments.write:
        command = f"python -m benchmarks.threads{' --spins' if arguments.spins else ''} --write"
        tables = "\n\n".join("\n".join(lines) for lines in parts)
        write_section("threads", f"{describe_machine()}\n\n`{command}`\n\n{tables}")


if __name__ == "__main__":
    main()
