"""FastSwitch: switching between requests, made cheap by runs of blocks and copies beside the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.effects._conversations import Conversation, Talked, Turn, chats, serve_chats, talk
from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import host_kv, live_engine, same_outputs, serve_live
from benchmarks.effects.serving import Load, Served, limits, llama_8b, poisson, serve, settings_of
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.replica.limits import ReplicaLimits
from penstock.workloads.charts import Chart, Series

KV_TOKENS, SLOTS, HOST_POOLS = 40_000, 64, 4
LLAMA_8B = {"kv_block_bytes": 16 * 131_072, "kv_layers": 32}
GROUP_TOKENS = 960
QUANTILES = [0.5, 0.9, 0.95, 0.97, 0.98, 0.99, 0.993, 0.996, 0.998, 0.999]
INTERVAL_STEPS = 25  # the card's frequency for LLaMA-8B, 0.04 a step


def _settings(preempt: str, launch_us: float = 10.0, **options: Any) -> Settings:
    """Random priorities; `options` of preempt/fastswitch."""
    lines = [f"{name} = {str(value).lower()}" for name, value in options.items()]
    file = "\n".join(
        [
            "[policies.options.fastswitch]",
            'mode = "random"',
            f"interval_steps = {INTERVAL_STEPS}",
            *lines,
            "[twin]",
            f"host_launch_us = {launch_us}",
        ]
    )
    return settings_of("sarathi", file, rank="fastswitch", preempt=preempt)


def _sizes(group_tokens: int, host_frac: float = HOST_POOLS, **changes: Any) -> ReplicaLimits:
    sizes: dict[str, Any] = {
        "running_max": SLOTS,
        "prefix_cache": False,
        "host_kv_blocks": int(host_frac * KV_TOKENS) // 16,
        "kv_group_tokens": group_tokens,
        **LLAMA_8B,
    }
    return limits(KV_TOKENS, **(sizes | changes))


def _a10(conversations: Sequence[Conversation], settings: Settings, sizes: ReplicaLimits) -> Served:
    return serve_chats(conversations, settings, sizes, llama_8b("a10", "vllm-2024"))


def _ttft_s(served: Served) -> float:
    return float(np.quantile(served.values("ttft_s"), 0.99))


def _gap_s(served: Served) -> float:
    return float(np.quantile(served.gaps_s(), 0.999))


def fastswitch_wins() -> Measured:
    """Llama-3-8B on an A10, KV for 40,000 tokens; 150 conversations of ShareGPT's shape, 2 begin a second.

    The card's test 2 with an eighth of its conversations, at twice the rate because ours think for 10 s only.
    Last: runs alone, which copy no less, gain by the cost of beginning a transfer, and without it nothing.
    """
    load = chats(150, 2.0)
    before = _a10(load, _settings("swap"), _sizes(0))
    after = _a10(load, _settings("fastswitch"), _sizes(GROUP_TOKENS))
    runs_only = {"beside": False, "reuse": False}
    runs = _a10(load, _settings("fastswitch", **runs_only), _sizes(GROUP_TOKENS))
    free_blocks = _a10(load, _settings("swap", 0.0), _sizes(0))
    free_runs = _a10(load, _settings("fastswitch", 0.0, **runs_only), _sizes(GROUP_TOKENS))
    ttft, gap = _ttft_s(before) / _ttft_s(after), _gap_s(before) / _gap_s(after)
    stalls = [each.stats.swap_stall_s_total for each in (before, after)]
    return Measured(
        f"P99 TTFT {_ttft_s(before):.2f} → {_ttft_s(after):.2f} s ({ttft:.1f}×); P99.9 gap "
        f"{_gap_s(before):.1f} → {_gap_s(after):.1f} s ({gap:.1f}×); steps stalled {stalls[0]:.0f} → "
        f"{stalls[1]:.1f} s",
        (
            Claim("P99 TTFT, before / after", ttft, low=1.8),
            Claim("P99.9 gap, before / after", gap, low=2.0),
            Claim("P99 TTFT, blocks / runs", _ttft_s(before) / _ttft_s(runs), low=1.3),
            Claim("makespan, blocks / runs", before.makespan_s / runs.makespan_s, low=1.05),
            Claim("makespan without launches, blocks / runs", free_blocks.makespan_s / free_runs.makespan_s,
                  low=0.98, high=1.02),
        ),
        (
            Chart(
                "Gaps between tokens",
                "milliseconds, by share of the gaps",
                QUANTILES,
                [
                    Series(name, f"s{index + 1}", (np.quantile(served.gaps_s(), QUANTILES) * 1e3).tolist())
                    for index, (name, served) in enumerate({"fastswitch": after, "swap": before}.items())
                ],
                lambda x: f"{x:.1%}",
                lambda y: f"{y:.0f} ms",
                y_is_log=True,
            ),
        ),
    )  # fmt: skip


def fastswitch_loses() -> Measured:
    """Requests that share a prompt of 1,500 tokens: what is kept by session is not shared between them."""
    keys = [f"system/{block}".encode() for block in range(1500 // 16)]
    load = poisson([(1560, 100)] * 150, 4.0, block_keys=keys)
    sharing = serve(load, settings_of("sarathi"), limits(KV_TOKENS), llama_8b("a10", "vllm-2024"))
    private = serve(load, settings_of("fastswitch"), _sizes(GROUP_TOKENS), llama_8b("a10", "vllm-2024"))
    before_s, after_s = _ttft_s(sharing), _ttft_s(private)
    return Measured(
        f"one system prompt for all: P99 TTFT {before_s:.2f} s with the prefix index → {after_s:.2f} s",
        (Claim("P99 TTFT, after / before", after_s / before_s, low=1.5),),
    )


def fastswitch_live() -> Measured:
    """The card's tests 1 and 3: 32 conversations of 4 turns, room for 8, new priorities every 25 steps.

    With 32 slots in the same KV, blocks are taken one by one from what is left, and runs are 3 blocks long.
    """
    kept_only = {"beside": False, "turns": False}
    talked = {
        "blocks": _talked("swap", 0),
        "runs": _talked("fastswitch", GROUP_TOKENS, {"beside": False, "reuse": False}),
        "kept": _talked("fastswitch", GROUP_TOKENS, kept_only),
        "half": _talked("fastswitch", GROUP_TOKENS, kept_only, host_frac=0.5),
        "beside": _talked("fastswitch", GROUP_TOKENS, {}),
    }
    copies = [talked[name].stats.swap_copies_total["out"] for name in ("blocks", "runs")]
    runs, kept, half = (talked[name].stats.swap_bytes_total for name in ("runs", "kept", "half"))
    equal = all(each.answers == talked["blocks"].answers for each in talked.values())
    return Measured(
        f"copies out {copies[0]} → {copies[1]} ({copies[0] / copies[1]:.0f}×), bytes out with reuse "
        f"−{100 * (1 - kept['out'] / runs['out']):.0f} %; answers are equal",
        (
            Claim("runs whose answers differ", float(not equal), high=0.0),
            Claim("copies out, blocks / runs", copies[0] / copies[1], low=8.0),
            Claim("bytes out, runs / blocks", runs["out"] / talked["blocks"].stats.swap_bytes_total["out"],
                  low=1.0, high=1.0),
            Claim("bytes out, kept / dropped", kept["out"] / runs["out"], high=0.6),
            Claim("bytes found on a host for half / for all", half["in"] / kept["in"], high=1.0),
        ),
    )  # fmt: skip


def _talked(
    preempt: str, group_tokens: int, options: dict[str, Any] | None = None, host_frac: float = 1.0
) -> Talked:
    from penstock.policies.stack import make_stack_of
    from penstock.replica.replica import Replica

    engine = live_engine()
    conversations = [Conversation(0.0, [Turn(160, 32), *[Turn(32, 32)] * 3])] * 32
    blocks = 24 * 8  # a whole conversation has 384 tokens
    host_blocks = int(24 * 32 * host_frac)
    sizes = replace(
        _sizes(group_tokens, running_max=8),
        kv_blocks=blocks,
        host_kv_blocks=host_blocks,
        kv_block_bytes=368_640,
    )
    stack = make_stack_of(_settings(preempt, **(options or {})))
    with host_kv(engine, host_blocks):
        return talk(Replica(sizes, stack), engine.executor, conversations, vocab=40_000)


def _growing(count: int) -> Load:
    """Answers that are longer than their prompts: KV runs out when everybody has begun."""
    return Load([Request(f"r{index}", 600, 1200 + 7 * (index % 20), 0.1 * index) for index in range(count)])


def _exhausted(preempt: str, hardware: str) -> Served:
    settings = settings_of("sarathi", preempt=preempt)
    sizes = _sizes(0, step_tokens_max=1024)
    return serve(_growing(100), settings, sizes, llama_8b(hardware, "vllm-2024"))


def swap_wins() -> Measured:
    """Growing contexts on an A10: some 1,500 tokens take longer to compute than to fetch."""
    before, after = _exhausted("youngest-recompute", "a10"), _exhausted("swap", "a10")
    ratio = before.makespan_s / after.makespan_s
    return Measured(
        f"makespan of 100 growing requests {before.makespan_s:.1f} → {after.makespan_s:.1f} s ({ratio:.2f}×)",
        (
            Claim("makespan, recompute / swap", ratio, low=1.01),
            Claim("tokens computed again", float(after.lost_tokens), high=0.0),
        ),
        (_spread("Time from arrival to the last token", "e2e_s", {"swap": after, "recompute": before}),),
    )


def swap_loses() -> Measured:
    """The same on an H100 with the same link: it computes again before 32 layers of copies have begun."""
    before, after = _exhausted("youngest-recompute", "h100-sxm"), _exhausted("swap", "h100-sxm")
    ratio = after.makespan_s / before.makespan_s
    return Measured(
        f"on an H100, makespan {before.makespan_s:.1f} → {after.makespan_s:.1f} s",
        (Claim("makespan, swap / recompute", ratio, low=1.005),),
    )


def swap_live() -> Measured:
    """SmolLM2-135M: 16 requests of 160 + 128 tokens at once, in KV for six of them, and room on the host."""
    load = Load([Request(f"r{index}", 160, 112 + 2 * index, 0.0) for index in range(16)])
    sizes = limits(1_600, prefix_cache=False, host_kv_blocks=400, kv_block_bytes=368_640, kv_layers=30)
    before, after = (
        serve_live(load, settings_of("sarathi", preempt=preempt), sizes)
        for preempt in ("youngest-recompute", "swap")
    )
    lost = [each.lost_tokens for each in (before, after)]
    ratio = before.makespan_s / after.makespan_s
    return Measured(
        f"tokens computed again {lost[0]} → {lost[1]}, preemptions {before.preemptions} → "
        f"{after.preemptions}; makespan {before.makespan_s:.1f} → {after.makespan_s:.1f} s ({ratio:.2f}×); "
        "outputs identical",
        (
            Claim("tokens computed again, recompute", lost[0], low=1000),
            Claim("tokens computed again, swap", lost[1], high=0),
            Claim("preemptions, swap", after.preemptions, low=5),
            same_outputs(before, after),
        ),
    )


def _tenants(rank: str, preempt: str) -> Served:
    """One tenant asks for twice what there is; the other asks now and then."""
    heavy = [replace(r, tenant="heavy") for r in poisson([(600, 200)] * 160, 8.0, seed=2).requests]
    light = [
        replace(r, id=f"l{r.id}", tenant="light") for r in poisson([(200, 80)] * 20, 0.8, seed=3).requests
    ]
    load = Load(sorted([*heavy, *light], key=lambda request: request.arrival_s))
    settings = settings_of("fastswitch", rank=rank, preempt=preempt)
    return serve(load, settings, _sizes(GROUP_TOKENS, running_max=32), llama_8b("a10", "vllm-2024"))


def rank_wins() -> Measured:
    """Tenants by what they were served lately, renewed every 25 steps: the light one does not wait."""
    fcfs, fair = _tenants("fcfs", "fastswitch"), _tenants("fastswitch", "fastswitch")
    light = [name for name in fair.outcomes if name.startswith("l")]
    before_s, after_s = (float(np.quantile(each.values("ttft_s", light), 0.99)) for each in (fcfs, fair))
    lost = fair.makespan_s / fcfs.makespan_s
    return Measured(
        f"P99 TTFT of the light tenant {before_s:.1f} → {after_s:.2f} s; makespan × {lost:.3f}",
        (
            Claim("P99 TTFT of the light tenant, before / after", before_s / after_s, low=4.0),
            Claim("makespan, after / before", lost, high=1.05),
        ),
        (_spread("TTFT of the light tenant", "ttft_s", {"fastswitch": fair, "fcfs": fcfs}, light),),
    )


def rank_live() -> Measured:
    """Queue order only, 4 slots: one tenant asks for 32 answers at once, another for 6 a little later."""
    requests = [Request(f"h{index}", 48, 24, 0.0, tenant="heavy") for index in range(32)]
    requests += [Request(f"l{index}", 48, 8, 0.1 + 0.02 * index, tenant="light") for index in range(6)]
    sizes = limits(8192, running_max=4)
    served = [serve_live(Load(requests), settings_of(rank=rank), sizes) for rank in ("fcfs", "fastswitch")]
    light = [request.id for request in requests if request.tenant == "light"]
    places = [each.mean_place(light) for each in served]
    waits_s = [float(each.values("ttft_s", light).mean()) for each in served]
    return Measured(
        f"mean TTFT of the light tenant {waits_s[0]:.1f} → {waits_s[1]:.1f} s, its mean place among the "
        f"first tokens {places[0]:.0f} → {places[1]:.0f} of 38",
        (
            Claim("mean place of the light tenant among first tokens, before", places[0], low=30),
            Claim("the same, after", places[1], high=18),
        ),
    )


def rank_loses() -> Measured:
    """Priorities that change for no reason: who has begun pauses for others, and tokens come in bursts."""
    load = chats(150, 2.0)
    fcfs = _a10(load, settings_of("fastswitch", rank="fcfs"), _sizes(GROUP_TOKENS))
    drawn = _a10(load, _settings("fastswitch"), _sizes(GROUP_TOKENS))
    before_s, after_s = _gap_s(fcfs), _gap_s(drawn)
    return Measured(
        f"random priorities: P99.9 gap {before_s * 1e3:.0f} → {after_s * 1e3:.0f} ms",
        (Claim("P99.9 gap, after / before", after_s / before_s, low=2.0),),
    )


def _spread(title: str, field: str, runs: dict[str, Served], ids: Sequence[str] | None = None) -> Chart:
    """Quantiles of a latency under two policies."""
    shares = [step / 50 for step in range(51)]
    series = [
        Series(name, f"s{index + 1}", np.quantile(served.values(field, ids), shares).tolist())
        for index, (name, served) in enumerate(runs.items())
    ]
    return Chart(
        title,
        "seconds, by share of the requests",
        shares,
        series,
        lambda x: f"{x:.0%}",
        lambda y: f"{y:.3g} s",
    )


EFFECTS = (
    Effect(
        "preempt",
        "fastswitch",
        "P99 TTFT ≥ 1.8× and P99.9 gap ≥ 2× better than swapping block by block (card fastswitch, test 2)",
        fastswitch_wins,
        fastswitch_loses,
        fastswitch_live,
        settings={"rank": "fastswitch"},
    ),
    Effect(
        "preempt",
        "swap",
        "nothing is computed twice; the baseline of card fastswitch",
        swap_wins,
        swap_loses,
        swap_live,
    ),
    Effect(
        "rank",
        "fastswitch",
        "priorities may follow need every 25 steps, since switching costs next to nothing (card fastswitch)",
        rank_wins,
        rank_loses,
        rank_live,
        settings={"preempt": "fastswitch"},
    ),
)
