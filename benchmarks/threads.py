"""From how many rows on a second thread pays, with threads that sleep between parallel regions.

    python -m benchmarks.threads [--write]

Times steps of the embedded model on one thread and on all, interleaved, in this process: decodes of 1 to 64
sequences, and prompt chunks. `FEW_ROWS` of engine/threads.py is read off this table, made on an idle machine.
With `GOMP_SPINCOUNT` set in the environment the threads spin instead of sleeping.
"""

from __future__ import annotations

import argparse
import os
from statistics import median

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

    def count_for(self, rows: int) -> int:
        return self.most


def decode_ms(executor: TorchExecutor, threads: FixedThreads, rows: int, most: int) -> tuple[float, float]:
    """Median milliseconds of a decode step on one thread and on `most`."""
    executor.reset()
    per_sequence = (CONTEXT + 4 * REPEATS) // BLOCK_TOKENS + 1
    starts = [
        SequenceStart(
            i, "", [7] * CONTEXT, CONTEXT, CONTEXT, CONTEXT - 1,
            tuple(range(i * per_sequence, (i + 1) * per_sequence)), GREEDY,
        )
        for i in range(rows)
    ]  # fmt: skip
    executor.execute(StepPlan(0, [Chunk(i, CONTEXT - 1, 1, True) for i in range(rows)], 0, starts=starts))
    return _alternate(threads, most, lambda: executor.execute(StepPlan(0, [], rows)).duration_s)


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    most = len(os.sched_getaffinity(0))
    source = resolve("smollm2-135m-instruct")
    threads = FixedThreads(most)
    engine = build_engine(Settings(), source, source.name, Stages(), threads)
    engine.executor.fill_pages(max(ROWS) * (CONTEXT // BLOCK_TOKENS + 4))
    lines = [f"| step | rows | 1 thread, ms | {most} threads, ms |", "| --- | ---: | ---: | ---: |"]
    for kind, counts, run in (("decode", ROWS, decode_ms), ("chunk", CHUNKS, chunk_ms)):
        for rows in counts:
            one_ms, most_ms = run(engine.executor, threads, rows, most)
            lines.append(f"| {kind} | {rows} | {one_ms:.1f} | {most_ms:.1f} |")
            print(lines[-1])
    if arguments.write:
        table = "\n".join(lines)
        write_section("threads", f"{describe_machine()}\n\n`python -m benchmarks.threads --write`\n\n{table}")


if __name__ == "__main__":
    main()
