"""First come, first served: nobody waits for ever, and everybody waits for the long one (textbook)."""

from __future__ import annotations

import random

import numpy as np

from benchmarks.effects.baselines import ShortestPrompt, baseline
from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import serve_live
from benchmarks.effects.serving import Load, Served, limits, serve, settings_of
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

SHORT_TOKENS, LONG_TOKENS, OUTPUT_TOKENS = 400, 6000, 8
LONG_FRAC = 0.01
REQUESTS = 3000
OPEN_DOOR = "[desk]\nqueue_requests_max = 65536\nqueue_wait_s_max = 1e6\nqueue_tokens_max = 1000000000"
RATE_RPS = 105.0  # a little more than it serves


def _overload() -> Load:
    """Short prompts beyond what the replica can serve, and a long one now and then."""
    draw, now_s, requests = random.Random("fcfs"), 0.0, []
    for index in range(REQUESTS):
        now_s += draw.expovariate(RATE_RPS)
        prompt = LONG_TOKENS if draw.random() < LONG_FRAC else SHORT_TOKENS
        requests.append(Request(f"r{index}", prompt, OUTPUT_TOKENS, now_s))
    return Load(requests)


def _served(load: Load, rank: str) -> Served:
    sizes = limits(200_000, step_tokens_max=2048)
    return serve(
        load, settings_of(rank=rank, file="[desk]\nqueue_requests_max = 65536\nqueue_wait_s_max = 1e6"), sizes
    )


def wins() -> Measured:
    """Llama-3-8B on an H100, at its limit: 3000 prompts of 400 tokens, one in a hundred of 6000 instead.

    Compared with the shortest prompt first, under which the long ones wait until the short ones are gone.
    """
    load = _overload()
    with baseline("rank", ShortestPrompt) as shortest:
        other = _served(load, shortest)
    ours = _served(load, "fcfs")
    worst_other, worst = (float(each.values("ttft_s").max()) for each in (other, ours))
    chart = Chart(
        "Wait for the first token by arrival",
        "seconds, worst of each fiftieth of the requests",
        *_by_arrival(load, {"fcfs": ours, "shortest prompt first": other}),
        lambda x: f"{x:.0f} s",
        lambda y: f"{y:.0f} s",
    )
    return Measured(
        f"longest wait {worst_other:.1f} → {worst:.1f} s",
        (Claim("longest wait, shortest-first / fcfs", worst_other / worst, low=4.0),),
        (chart,),
    )


def _by_arrival(load: Load, runs: dict[str, Served]) -> tuple[list[float], list[Series]]:
    parts = np.array_split(np.arange(len(load.requests)), 50)
    xs = [load.requests[part[0]].arrival_s for part in parts]
    series = []
    for number, (name, served) in enumerate(runs.items()):
        waits = [served.outcomes[request.id].ttft_s or 0.0 for request in load.requests]
        series.append(Series(name, f"s{number + 1}", [max(waits[i] for i in part) for part in parts]))
    return xs, series


def loses() -> Measured:
    """The same load: under fcfs the short prompts, ninety-nine of a hundred, wait behind the long ones."""
    load = _overload()
    with baseline("rank", ShortestPrompt) as shortest:
        other = _served(load, shortest)
    ours = _served(load, "fcfs")
    mean_other, mean = (float(each.values("ttft_s").mean()) for each in (other, ours))
    return Measured(
        f"mean wait {mean_other:.1f} → {mean:.1f} s",
        (Claim("mean wait, fcfs / shortest-first", mean / mean_other, low=2.0),),
    )


def live() -> Measured:
    """SmolLM2-135M: 200 prompts of 96 tokens within five seconds, and soon after the first, four of 2000."""
    shorts = [Request(f"s{index}", 96, 4, 0.025 * index) for index in range(200)]
    longs = [Request(f"l{index}", 2000, 4, 0.3 + 0.1 * index) for index in range(4)]
    load = Load(sorted([*shorts, *longs], key=lambda request: request.arrival_s))
    sizes = limits(40_000, running_max=16)
    with baseline("rank", ShortestPrompt) as shortest:
        other = serve_live(load, settings_of(rank=shortest, file=OPEN_DOOR), sizes)
    ours = serve_live(load, settings_of(rank="fcfs", file=OPEN_DOOR), sizes)
    names = [request.id for request in longs]
    long_other, long = (float(each.values("ttft_s", names).max()) for each in (other, ours))
    mean_other, mean = (float(each.values("ttft_s").mean()) for each in (other, ours))
    return Measured(
        f"the long ones wait {long_other:.1f} → {long:.1f} s; mean wait {mean_other:.1f} → {mean:.1f} s",
        (Claim("longest wait of a long one, shortest-first / fcfs", long_other / long, low=1.5),),
    )


EFFECTS = (
    Effect(
        "rank",
        "fcfs",
        "the shortest possible longest wait, at the price of the mean (textbook)",
        wins,
        loses,
        live,
    ),
)
