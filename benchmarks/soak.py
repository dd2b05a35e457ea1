"""Many streams for minutes, with random cancels: is everything accounted for, right, and flat?

    python -m benchmarks.soak [--minutes 5] [--streams 64] [--seed 0] [--model NAME] [--write]

Serves the model as users do and keeps that many clients busy: random prompts, half of them on shared stems,
random output lengths, streamed and whole, a third of them leaving at a random moment (while queued, before
the first token, in mid-stream). The engine checks its own books as it runs. Before, each prompt is run alone
in this process, greedy; every answer that was not left must have just that text. At the end every request
must have ended in one way, at the client and in the server's own counts; no KV may be held; neither process
may have grown in the last half by more than `GROWTH_FRAC` and `GROWTH_BYTES`; and the server must exit 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.in_process import InProcess
from benchmarks.results import describe_machine, write_section
from benchmarks.server_process import ServerProcess, metric_sum, start_server, wait_until
from penstock.core.units import MIB

MODEL = "smollm2-135m-instruct"
COMPLETIONS = "/v1/completions"

STEMS = 4
STEM_TOKENS = 128
OWN_TOKENS_MAX = 96
OUTPUT_TOKENS_MAX = 64
LEAVE_FRAC = 1 / 3
LEAVE_S_MAX = 2.0
WHOLE_FRAC = 0.2  # answered in one piece instead of streamed
SAMPLE_S = 5.0
SAMPLES_MIN = 12
CHECK_STEPS = 20  # the engine checks its books so often
ANSWER_TIMEOUT_S = 300.0
GROWTH_FRAC, GROWTH_BYTES = 0.02, 8 * MIB  # of the resident set, in the last half, for either process

OK, LEFT, WRONG, REFUSED, BROKEN = "ok", "left", "wrong text", "refused", "broken"


@dataclass(frozen=True)
class Task:
    """A prompt, how much to answer, and the text that must come."""

    prompt: list[int]
    output_tokens: int
    text: str


@dataclass(frozen=True)
class Sample:
    """A look at the server. Seconds since the load began."""

    at_s: float
    gateway_bytes: int
    engine_bytes: int
    running: float
    waiting: float
    kv_frac: float
    output_tokens: float


@dataclass
class Soak:
    """What happened. `problems` is empty when all is well."""

    ends: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    span_s: float = 0.0
    preemptions: float = 0.0
    cached_tokens: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.ends.values())


def make_tasks(alone: InProcess, count: int, seed: int) -> list[Task]:
    """Seeded prompts of random tokens, every other one behind one of a few shared stems."""
    draw = random.Random(f"soak:{seed}")
    special = alone.tokenizer.special_ids
    words = [token for token in range(alone.tokenizer.vocab_size) if token not in special]
    stems = [draw.choices(words, k=STEM_TOKENS) for _ in range(STEMS)]
    tasks = []
    for number in range(count):
        own = draw.choices(words, k=draw.randint(1, OWN_TOKENS_MAX))
        prompt = draw.choice(stems) + own if number % 2 else own
        output_tokens = draw.randint(1, OUTPUT_TOKENS_MAX)
        tasks.append(Task(prompt, output_tokens, alone.text(prompt, output_tokens, ignore_eos=True)))
    return tasks


async def run_client(
    http: httpx.AsyncClient,
    model: str,
    tasks: Sequence[Task],
    draw: random.Random,
    until_s: float,
    soak: Soak,
) -> None:
    """One request after the other until the time is up; each ends in exactly one way."""
    while time.monotonic() < until_s:
        task = draw.choice(tasks)
        is_stream = draw.random() >= WHOLE_FRAC
        leaves = draw.random() < LEAVE_FRAC
        events_max = draw.randint(0, OUTPUT_TOKENS_MAX) if leaves and draw.random() < 0.5 else None
        wait_s = draw.uniform(0.0, LEAVE_S_MAX) if leaves else ANSWER_TIMEOUT_S
        try:
            async with asyncio.timeout(wait_s):
                end = await ask(http, model, task, is_stream, events_max)
        except TimeoutError:
            end = LEFT if leaves else BROKEN
        except httpx.HTTPError as error:
            soak.problems.append(f"a connection broke: {error!r}")
            end = BROKEN
        soak.ends[end] += 1


async def ask(
    http: httpx.AsyncClient, model: str, task: Task, is_stream: bool, events_max: int | None
) -> str:
    """How it ended. Returning before the answer's end closes the connection: that is how a client leaves."""
    body = {
        "model": model,
        "prompt": task.prompt,
        "max_tokens": task.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": is_stream,
    }
    async with http.stream("POST", COMPLETIONS, json=body) as answer:
        if answer.status_code != 200:
            return REFUSED
        if not is_stream:
            whole = json.loads(await answer.aread())
            return OK if whole["choices"][0]["text"] == task.text else WRONG
        text, events = "", 0
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return OK if text == task.text else WRONG
            if line.startswith("data: "):
                if events == events_max:
                    return LEFT
                events += 1
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return BROKEN  # it ended without its last line


async def run_load(
    server: ServerProcess, tasks: Sequence[Task], streams: int, span_s: float, seed: int
) -> Soak:
    soak = Soak()
    began_s = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=streams)
    async with httpx.AsyncClient(
        base_url=server.url, limits=limits, timeout=ANSWER_TIMEOUT_S, trust_env=False
    ) as http:
        watcher = asyncio.create_task(watch(server, soak, began_s, min(SAMPLE_S, span_s / SAMPLES_MIN)))
        model = str(server.info["model"])
        clients = [
            run_client(http, model, tasks, random.Random(f"client:{seed}:{number}"), began_s + span_s, soak)
            for number in range(streams)
        ]
        await asyncio.gather(*clients)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    soak.span_s = time.monotonic() - began_s
    return soak


async def watch(server: ServerProcess, soak: Soak, began_s: float, every_s: float) -> None:
    while True:
        soak.samples.append(await asyncio.to_thread(take_sample, server, began_s))
        await asyncio.sleep(every_s)


def take_sample(server: ServerProcess, began_s: float) -> Sample:
    metrics = server.metrics()
    return Sample(
        at_s=time.monotonic() - began_s,
        gateway_bytes=server.gateway.memory_info().rss,
        engine_bytes=server.engine.memory_info().rss,
        running=metric_sum(metrics, "penstock:num_requests_running"),
        waiting=metric_sum(metrics, "penstock:num_requests_waiting"),
        kv_frac=metric_sum(metrics, "penstock:kv_cache_usage_perc"),
        output_tokens=metric_sum(metrics, "penstock:generation_tokens_total"),
    )


def check(soak: Soak, server: ServerProcess) -> None:
    """Add to `soak.problems` whatever is not as it must be; ends the server."""
    for end in (WRONG, REFUSED, BROKEN):
        if soak.ends[end]:
            soak.problems.append(f"{soak.ends[end]} requests: {end}")
    if not soak.ends[OK] or not soak.ends[LEFT]:
        soak.problems.append("the load was too short to tell anything: nobody finished, or nobody left")
    try:
        wait_until(lambda: not any(server.load().values()), "idle, with no KV held")
        check_counts(soak, server.metrics())
    except (AssertionError, httpx.HTTPError) as error:
        soak.problems.append(str(error))
    soak.problems += growth_problems(soak.samples)
    code = server.stop()
    if code != 0 or "Traceback" in server.log:
        soak.problems.append(f"the server ended with {code}:\n{server.log[-2000:]}")


def check_counts(soak: Soak, metrics: dict[str, float]) -> None:
    """The server's own count of how requests ended; one that left before it was read never began."""
    ended = {
        name.partition('finished_reason="')[2].partition('"')[0]: value
        for name, value in metrics.items()
        if name.startswith("penstock:request_success_total{")
    }
    answered = ended.pop("length", 0.0) + ended.pop("stop", 0.0)
    cancelled = ended.pop("cancelled", 0.0)
    if ended and any(ended.values()):
        soak.problems.append(f"requests ended as {ended}")
    # Who leaves when the last token is on its way has left, though the server had finished.
    if answered < soak.ends[OK] or answered + cancelled > soak.requests:
        soak.problems.append(f"{answered:.0f} answered, {cancelled:.0f} cancelled, of {soak.requests} sent")
    soak.preemptions = metric_sum(metrics, "penstock:num_preemptions_total")
    soak.cached_tokens = metric_sum(metrics, "penstock:prefix_cache_hits_total")


def growth_problems(samples: Sequence[Sample]) -> list[str]:
    """Compares the medians of the third and the last quarter."""
    quarter = len(samples) // 4
    if quarter < 2:
        return ["too few samples of memory"]
    problems = []
    for process in ("gateway_bytes", "engine_bytes"):
        series = [getattr(sample, process) for sample in samples]
        before = statistics.median(series[2 * quarter : 3 * quarter])
        after = statistics.median(series[3 * quarter :])
        if after - before > GROWTH_FRAC * before + GROWTH_BYTES:
            problems.append(
                f"{process} grew from {before / MIB:.0f} to {after / MIB:.0f} MiB in the last half"
            )
    return problems


def soak_server(
    model: str, folder: Path, *, minutes: float, streams: int, tasks: int, seed: int, flags: Sequence[str]
) -> Soak:
    """Everything: the reference, the server, the load, the checks. `flags` go to `penstock serve`."""
    options: dict[str, Any] = {"threads": 0}
    if "--dtype" in flags:
        options["dtype"] = flags[flags.index("--dtype") + 1]
    reference = make_tasks(InProcess(model, kv_memory="64MiB", **options), tasks, seed)
    settings = {"replica.check_invariants_steps": CHECK_STEPS}
    with start_server(model, folder, *flags, settings=settings) as server:
        soak = asyncio.run(run_load(server, reference, streams, minutes * 60.0, seed))
        check(soak, server)
    return soak


def table(soak: Soak) -> str:
    first, last = soak.samples[0], soak.samples[-1]
    half = soak.samples[len(soak.samples) // 2]
    rate = (last.output_tokens - first.output_tokens) / (last.at_s - first.at_s)
    ends = ", ".join(f"{count} {end}" for end, count in sorted(soak.ends.items()))
    rows = [
        ("requests", f"{soak.requests} in {soak.span_s:.0f} s: {ends}"),
        ("output tokens/s", f"{rate:.0f}"),
        ("running, waiting (mean)", f"{mean(soak, 'running'):.0f}, {mean(soak, 'waiting'):.0f}"),
        ("preemptions", f"{soak.preemptions:.0f}"),
        ("prompt tokens found in cache", f"{soak.cached_tokens:.0f}"),
        ("KV used at most", f"{max(sample.kv_frac for sample in soak.samples):.0%}"),
        ("gateway RSS, MiB: start, half, end", megabytes("gateway_bytes", first, half, last)),
        ("engine RSS, MiB: start, half, end", megabytes("engine_bytes", first, half, last)),
        ("problems", "; ".join(soak.problems) or "none"),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def mean(soak: Soak, name: str) -> float:
    return statistics.fmean(getattr(sample, name) for sample in soak.samples)


def megabytes(name: str, *samples: Sample) -> str:
    return ", ".join(f"{getattr(sample, name) / MIB:.0f}" for sample in samples)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64, help="distinct prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--kv-memory", default="96MiB", help="small enough that some must be preempted")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = soak_server(
            arguments.model,
            Path(folder),
            minutes=arguments.minutes,
            streams=arguments.streams,
            tasks=arguments.prompts,
            seed=arguments.seed,
            flags=("--kv-memory", arguments.kv_memory, "--running-max", str(arguments.streams)),
        )
    print(table(soak))
    if arguments.write:
        command = f"python -m benchmarks.soak --minutes {arguments.minutes:g} --streams {arguments.streams}"
        write_section("soak", f"{describe_machine()}\n\n`{command} --write`\n\n{table(soak)}")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
