"""Whole prompts up front: a started prompt gets through; outputs to come are not counted (vLLM)."""

from __future__ import annotations

from benchmarks.effects.baselines import FirstBlock, baseline
from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import same_outputs, serve_live
from benchmarks.effects.serving import Load, Served, azure_lengths, limits, poisson, serve, settings_of
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

REQUESTS, RATE_RPS = 600, 14.0
KV_TOKENS = (8_000, 12_000, 16_000, 24_000, 32_000)  # of the picture; the second is the scenario's
OPEN_DOOR = "[desk]\nqueue_requests_max = 65536\nqueue_wait_s_max = 1e6\nqueue_tokens_max = 1000000000"


def _served(admit: str, load: Load, kv_tokens: int) -> Served:
    return serve(load, settings_of(admit=admit, file=OPEN_DOOR), limits(kv_tokens))


def wins() -> Measured:
    """Azure conversation lengths up to 4000 tokens on Llama-3-8B and an H100, with little KV.

    Compared with starting whoever can get one block: prompts that do not fit crowd each other out half way.
    """
    lengths = [pair for pair in azure_lengths() if sum(pair) <= 4000][:REQUESTS]
    load = poisson(lengths, RATE_RPS)
    lost: dict[str, list[float]] = {"whole-prompt": [], "first block": []}
    spans_s: dict[str, float] = {}
    with baseline("admit", FirstBlock) as first_block:
        for kv_tokens in KV_TOKENS:
            for name, admit in (("whole-prompt", "whole-prompt"), ("first block", first_block)):
                served = _served(admit, load, kv_tokens)
                lost[name].append(served.lost_tokens / sum(map(sum, lengths)))
                if kv_tokens == KV_TOKENS[1]:
                    spans_s[name] = served.makespan_s
    ours, other = lost["whole-prompt"][1], lost["first block"][1]
    chart = Chart(
        "Tokens computed again",
        "share of all tokens, by size of the KV pool",
        KV_TOKENS,
        [Series(name, f"s{index + 1}", values) for index, (name, values) in enumerate(lost.items())],
        lambda x: f"{x / 1000:.0f}k",
        lambda y: f"{y:.0%}",
    )
    return Measured(
        f"computed again: {other:.0%} → {ours:.0%} of the tokens; "
        f"all served in {spans_s['first block']:.0f} → {spans_s['whole-prompt']:.0f} s",
        (Claim("computed again, first-block / whole-prompt", other / ours, low=4.0),),
        (chart,),
    )


def loses() -> Measured:
    """Short prompts with long outputs: many start, and push each other out as they grow.

    Compared with counting all of the output that may come.
    """
    load = Load([Request(f"r{index}", 100, 900, 0.05 * index) for index in range(120)])
    other = _served("conservative", load, 24_000)
    ours = _served("whole-prompt", load, 24_000)
    gap_other, gap = (float(each.gaps_s().max()) for each in (other, ours))
    return Measured(
        f"{other.preemptions} → {ours.preemptions} preemptions; longest gap {gap_other:.2f} → {gap:.2f} s",
        (
            Claim("preemptions, all output counted", other.preemptions, high=0),
            Claim("preemptions, whole-prompt", ours.preemptions, low=50),
            Claim("longest gap, whole-prompt / all output counted", gap / gap_other, low=10.0),
        ),
    )


def live() -> Measured:
    """SmolLM2-135M: 24 prompts of 400 to 1200 tokens at once, in KV for four of them."""
    prompts = [400 + 200 * (index % 5) for index in range(24)]
    load = Load([Request(f"r{index}", prompt, 40, 0.0) for index, prompt in enumerate(prompts)])
    sizes = limits(4000, step_tokens_max=256)
    with baseline("admit", FirstBlock) as first_block:
        other = serve_live(load, settings_of(admit=first_block), sizes)
    ours = serve_live(load, settings_of(admit="whole-prompt"), sizes)
    lost_other, lost = other.lost_tokens, ours.lost_tokens
    return Measured(
        f"computed again {lost_other / 1000:.1f}k → {lost / 1000:.1f}k tokens; "
        f"all served in {other.makespan_s:.1f} → {ours.makespan_s:.1f} s; outputs identical",
        (
            Claim("computed again, first-block − whole-prompt", lost_other - lost, low=2000),
            same_outputs(ours, other),
        ),
    )


EFFECTS = (
    Effect(
        "admit",
        "whole-prompt",
        "a prompt that starts gets through without being computed twice (vLLM)",
        wins,
        loses,
        live,
    ),
)
