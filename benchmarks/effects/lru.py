"""Least recently used: conversations come back soon or never; a scan comes back just too late (textbook)."""

from __future__ import annotations

import heapq
import random

from benchmarks.effects.baselines import Fifo, Newest, baseline
from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import serve_live
from benchmarks.effects.serving import Load, Served, limits, serve, settings_of
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

BLOCK_TOKENS = 16
SYSTEMS, SYSTEM_TOKENS = 4, 1024
TURN_TOKENS, OUTPUT_TOKENS, TURNS = 512, 64, 8
THINK_S = 8.0
CONVERSATIONS, START_GAP_S = 120, 2.0
KV_TOKENS = (24_000, 40_000, 60_000, 90_000)  # of the picture; the second is the scenario's


def keys_of(name: str, tokens: int) -> list[bytes]:
    return [f"{name}/{index}".encode() for index in range(tokens // BLOCK_TOKENS)]


def conversations(
    count: int,
    gap_s: float,
    think_s: float,
    system_tokens: int,
    turn_tokens: int,
    turns: int,
    output_tokens: int = OUTPUT_TOKENS,
) -> Load:
    """Each turn's prompt is one of four system prompts, the conversation so far and `turn_tokens` more."""
    draw = random.Random("lru")
    coming: list[tuple[float, int, int]] = []
    now_s = 0.0
    for index in range(count):
        now_s += draw.expovariate(1 / gap_s)
        coming.append((now_s, index, 0))
    heapq.heapify(coming)
    requests = []
    while coming:
        at_s, index, turn = heapq.heappop(coming)
        own_tokens = turn_tokens * (turn + 1)
        tokens = system_tokens + own_tokens
        keys = keys_of(f"s{index % SYSTEMS}", system_tokens) + keys_of(f"c{index}", own_tokens)
        requests.append(Request(f"c{index}-{turn}", tokens, output_tokens, at_s, block_keys=keys))
        if turn + 1 < turns:
            heapq.heappush(coming, (at_s + draw.expovariate(1 / think_s), index, turn + 1))
    return Load(requests)


def _served(load: Load, retain: str, kv_tokens: int) -> Served:
    return serve(load, settings_of(retain=retain), limits(kv_tokens, step_tokens_max=2048))


def wins() -> Measured:
    """Llama-3-8B on an H100: 120 conversations of 8 turns, some 30 at a time, in a pool for part of them.

    Compared with dropping the oldest content first, however often it was read since.
    """
    load = conversations(CONVERSATIONS, START_GAP_S, THINK_S, SYSTEM_TOKENS, TURN_TOKENS, TURNS)
    found: dict[str, list[float]] = {"lru": [], "oldest content first": []}
    ttft_ms: dict[str, float] = {}
    for kv_tokens in KV_TOKENS:
        with baseline("retain", Fifo) as fifo:
            for name, retain in (("lru", "lru"), ("oldest content first", fifo)):
                served = _served(load, retain, kv_tokens)
                found[name].append(served.hit_frac)
                if kv_tokens == KV_TOKENS[1]:
                    ttft_ms[name] = float(served.values("ttft_s").mean()) * 1e3
    ours, other = found["lru"][1], found["oldest content first"][1]
    chart = Chart(
        "Prompt tokens found in the cache",
        "share, by size of the KV pool",
        KV_TOKENS,
        [Series(name, f"s{index + 1}", values) for index, (name, values) in enumerate(found.items())],
        lambda x: f"{x / 1000:.0f}k",
        lambda y: f"{y:.0%}",
        y_max=1.0,
    )
    ttft_other, ttft = ttft_ms["oldest content first"], ttft_ms["lru"]
    return Measured(
        f"found {other:.0%} → {ours:.0%} of the prompt tokens; mean TTFT {ttft_other:.0f} → {ttft:.0f} ms",
        (
            Claim("share found, lru − oldest first", ours - other, low=0.05),
            Claim("mean TTFT, oldest first / lru", ttft_other / ttft, low=1.05),
        ),
        (chart,),
    )


def loses() -> Measured:
    """Twelve documents asked about in turn, round after round, where eight fit: each has just been dropped.

    Compared with dropping the newest.
    """
    load = _scan(12, 2048, rounds=6)
    sizes = limits(8 * 2048, step_tokens_max=2048)
    with baseline("retain", Newest) as newest:
        other = serve(load, settings_of(retain=newest), sizes).hit_frac
    ours = serve(load, settings_of(retain="lru"), sizes).hit_frac
    return Measured(
        f"a scan of 12 documents where 8 fit: found {other:.0%} → {ours:.0%}",
        (Claim("share found", ours, high=0.001), Claim("share found, newest first", other, low=0.4)),
    )


def _scan(documents: int, tokens: int, rounds: int) -> Load:
    return Load(
        [
            Request(f"{number}-{index}", tokens + 16, 4, 2.0 * (number * documents + index),
                    block_keys=[*keys_of(f"d{index}", tokens), f"q{number}-{index}".encode()])
            for number in range(rounds)
            for index in range(documents)
        ]
    )  # fmt: skip


def live() -> Measured:
    """SmolLM2-135M: 24 conversations of 5 turns, 512 shared tokens and 96 more a turn, in a pool of 4096."""
    load = conversations(24, 1.5, 4.0, 512, 96, 5, output_tokens=16)
    sizes = limits(4096, step_tokens_max=512)
    found, ttft_ms = {}, {}
    with baseline("retain", Fifo) as fifo:
        for name, retain in (("oldest first", fifo), ("lru", "lru")):
            served = serve_live(load, settings_of(retain=retain), sizes)
            found[name] = served.hit_frac
            ttft_ms[name] = float(served.values("ttft_s").mean()) * 1e3
    return Measured(
        f"found {found['oldest first']:.0%} → {found['lru']:.0%}; mean TTFT {ttft_ms['oldest first']:.0f} → "
        f"{ttft_ms['lru']:.0f} ms",
        (Claim("share found, lru − oldest first", found["lru"] - found["oldest first"], low=0.05),),
    )


EFFECTS = (
    Effect(
        "retain",
        "lru",
        "conversations find what they computed a short while ago (textbook)",
        wins,
        loses,
        live,
    ),
)
