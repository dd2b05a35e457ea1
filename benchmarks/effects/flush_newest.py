"""FastGen out of memory: wait for a block, flush only when nothing moves (card deepspeed-fastgen)."""

from __future__ import annotations

from functools import cache

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import serve_live
from benchmarks.effects.serving import Load, Served, limits, serve, settings_of
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

POOLS = (32_000, 40_000, 48_000, 56_000)  # tokens of KV
POOL = 40_000


@cache
def _served(preempt: str, pool: int = POOL) -> Served:
    """More work than memory on an H100: prompts of 400 tokens whose answers outgrow the pool."""
    draw = np.random.default_rng(11)
    requests = [
        Request(f"r{i}", int(draw.integers(200, 600)), int(draw.integers(50, 900)), 0.02 * i)
        for i in range(160)
    ]
    sizes = limits(pool, running_max=128)
    return serve(Load(requests), settings_of(preempt=preempt), sizes)


def wins() -> Measured:
    """A pool of 40,000 tokens: how many tokens of KV are thrown away and computed again."""
    before, after = _served("youngest-recompute"), _served("flush-newest")
    chart = Chart(
        "Tokens computed twice",
        "thousands, by the size of the KV pool",
        POOLS,
        [
            Series(name, tone, [_served(name, pool).lost_tokens / 1e3 for pool in POOLS])
            for name, tone in (("flush-newest", "s1"), ("youngest-recompute", "s2"))
        ],
        lambda x: f"{x / 1e3:.0f}k tokens",
        lambda y: f"{y:.0f}k",
    )
    return Measured(
        f"{before.lost_tokens:,} → {after.lost_tokens:,} tokens computed twice, "
        f"{before.preemptions} → {after.preemptions} preemptions; "
        f"all done after {before.makespan_s:.1f} → {after.makespan_s:.1f} s",
        (
            Claim("tokens computed twice, before / after", before.lost_tokens / after.lost_tokens, low=1.2),
            Claim("flushes", after.preemptions, low=1),
        ),
        (chart,),
    )


def loses() -> Measured:
    """The same load: whoever sits out waits for its next token."""
    before, after = _served("youngest-recompute"), _served("flush-newest")
    tpot_before, tpot_after = (float(np.mean(each.values("tpot_s"))) * 1e3 for each in (before, after))
    return Measured(
        f"mean TPOT {tpot_before:.1f} → {tpot_after:.1f} ms",
        (Claim("mean TPOT, after / before", tpot_after / tpot_before, low=1.02),),
    )


def live() -> Measured:
    """The card's test 4, six requests that grow in ten blocks; and sixteen in KV for a third of them."""
    few = [Request(f"r{index}", 16, 48, 0.0) for index in range(6)]
    many = [Request(f"r{index}", 64, 64 + 96 * index // 15, 0.0) for index in range(16)]
    runs = [
        [serve_live(Load(load), settings_of(preempt=name), limits(pool))
         for name in ("youngest-recompute", "flush-newest")]
        for load, pool in ((few, 160), (many, 1200))
    ]  # fmt: skip
    before, after = runs[1]
    few_lost, lost = [[each.lost_tokens for each in pair] for pair in runs]
    unequal = sum(pair[0].tokens[name] != pair[1].tokens[name] for pair in runs for name in pair[0].tokens)
    return Measured(
        f"six in ten blocks: {few_lost[0]} → {few_lost[1]} tokens computed twice; sixteen: "
        f"{lost[0]} → {lost[1]}, {before.preemptions} → {after.preemptions} preemptions; outputs identical",
        (
            Claim("six: tokens computed twice, after / before", few_lost[1] / few_lost[0], high=0.6),
            Claim("sixteen: tokens computed twice, after / before", lost[1] / lost[0], high=0.8),
            Claim("sixteen: preemptions, after / before", after.preemptions / before.preemptions, high=0.7),
            Claim("flushes", after.preemptions, low=1),
            Claim("outputs that differ", unequal, high=0),
        ),
    )


EFFECTS = (
    Effect(
        "preempt",
        "flush-newest",
        "six requests grow in ten blocks: all finish, outputs unchanged (card deepspeed-fastgen, test 4)",
        wins,
        loses,
        live,
    ),
)
