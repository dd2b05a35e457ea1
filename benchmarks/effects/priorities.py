"""Classes, deadlines and predicted lengths: who goes first, and who pays for it (docs/policies.md)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Final

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import same_outputs, serve_live
from benchmarks.effects.serving import Ended, Load, Served, azure_lengths, limits, serve, settings_of
from penstock.core.metrics import Slo
from penstock.core.request import Request
from penstock.workloads.charts import Chart, Series

KV_TOKENS: Final = 400_000
SLOTS: Final = 16


def _quantile(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q))


def _quantile_chart(title: str, subtitle: str, found: dict[str, np.ndarray]) -> Chart:
    fractions = [index / 100 for index in range(1, 100)]
    series = [
        Series(name, tone, [float(each) for each in np.quantile(values, fractions)])
        for (name, values), tone in zip(found.items(), ("s1", "s2", "s3"), strict=False)
    ]
    return Chart(
        title, subtitle, fractions, series, lambda x: f"{x:.0%}", lambda y: f"{y:.2g} s", y_is_log=True
    )


# ---- classes --------------------------------------------------------------------------------------------

HIGH: Final = [f"h{index}" for index in range(60)]
LOW: Final = [f"l{index}" for index in range(160)]


@cache
def _classes(rank: str, preempt: str) -> Served:
    """A flood of long low-class requests keeps every slot busy; short high-class ones come at 3 a second."""
    draw, now_s = random.Random("classes"), 0.5
    low = int(rank == "priority")  # no other rank takes priorities at the door
    requests = [
        Request(name, 512, draw.randint(200, 600), 0.01 * index, priority=low)
        for index, name in enumerate(LOW)
    ]
    for name in HIGH:
        requests.append(Request(name, 256, 50, now_s))
        now_s += draw.expovariate(3.0)
    load = Load(sorted(requests, key=lambda request: request.arrival_s))
    return serve(load, settings_of(rank=rank, preempt=preempt), limits(KV_TOKENS, running_max=SLOTS))


YOUNGEST: Final = "youngest-recompute"


def priority_rank_wins() -> Measured:
    """Llama-3-8B on an H100, 16 slots, all taken: the high class passes the queue."""
    before, after = _classes("fcfs", YOUNGEST), _classes("priority", YOUNGEST)
    p99_s = [_quantile(served.values("ttft_s", HIGH), 0.99) for served in (before, after)]
    return Measured(
        f"P99 TTFT of the high class {p99_s[0]:.1f} → {p99_s[1]:.2f} s",
        (Claim("P99 TTFT of the high class, after / before", p99_s[1] / p99_s[0], high=0.3),),
        (
            _quantile_chart(
                "First token of the high class",
                "seconds from arrival, by share of requests; 16 slots, all taken by the low class",
                {
                    "fcfs": before.values("ttft_s", HIGH),
                    "priority": after.values("ttft_s", HIGH),
                    "priority, displacing": _classes("priority", "priority").values("ttft_s", HIGH),
                },
            ),
        ),
    )


def priority_rank_live() -> Measured:
    """The real CPU engine, 4 slots: 32 requests of a low class wait for them when 8 of a high class come."""
    served = {}
    for rank in ("fcfs", "priority"):
        low = int(rank == "priority")
        requests = [Request(f"l{index}", 64, 32, 0.0, priority=low) for index in range(32)]
        requests += [Request(f"h{index}", 32, 8, 0.1 + 0.02 * index) for index in range(8)]
        served[rank] = serve_live(Load(requests), settings_of(rank=rank), limits(8192, running_max=4))
    high = HIGH[:8]
    places = [each.mean_place(high) for each in served.values()]
    waits_s = [float(each.values("ttft_s", high).mean()) for each in served.values()]
    return Measured(
        f"mean TTFT of the high class {waits_s[0]:.1f} → {waits_s[1]:.1f} s, its mean place among the first "
        f"tokens {places[0]:.0f} → {places[1]:.0f} of 40; every output the same",
        (
            Claim("mean place of the high class among first tokens, before", places[0], low=30),
            Claim("the same, after", places[1], high=18),
            same_outputs(*served.values()),
        ),
    )


def priority_rank_loses() -> Measured:
    """The same: what the high class gains in waiting, the low class loses."""
    before, after = _classes("fcfs", YOUNGEST), _classes("priority", YOUNGEST)
    means_s = [float(served.values("ttft_s", LOW).mean()) for served in (before, after)]
    return Measured(
        f"mean TTFT of the low class {means_s[0]:.2f} → {means_s[1]:.2f} s",
        (Claim("mean TTFT of the low class, after / before", means_s[1] / means_s[0], low=1.05),),
    )


def priority_preempt_wins() -> Measured:
    """The same, against a queue in the same order whose head waits for a slot."""
    before, after = _classes("priority", YOUNGEST), _classes("priority", "priority")
    p99_s = [_quantile(served.values("ttft_s", HIGH), 0.99) for served in (before, after)]
    return Measured(
        f"P99 TTFT of the high class at a full slot cap {p99_s[0] * 1e3:.0f} → {p99_s[1] * 1e3:.0f} ms, "
        f"{after.preemptions} times somebody was displaced",
        (
            Claim("P99 TTFT of the high class, after / before", p99_s[1] / p99_s[0], high=0.25),
            Claim("somebody was displaced", after.preemptions, low=10),
        ),
        (
            _quantile_chart(
                "First token of the high class at a full slot cap",
                "seconds from arrival, by share of requests; both queues go by priority",
                {
                    YOUNGEST: before.values("ttft_s", HIGH),
                    "priority": after.values("ttft_s", HIGH),
                },
            ),
        ),
    )


def priority_preempt_loses() -> Measured:
    """The same: displaced work is computed again, so everything takes longer."""
    before, after = _classes("priority", YOUNGEST), _classes("priority", "priority")
    lost = after.lost_tokens
    p99_s = [_quantile(served.values("tpot_s", LOW), 0.99) for served in (before, after)]
    return Measured(
        f"P99 TPOT of the low class {p99_s[0] * 1e3:.1f} → {p99_s[1] * 1e3:.1f} ms; {lost:,} tokens computed "
        "again",
        (
            Claim("P99 TPOT of the low class, after / before", p99_s[1] / p99_s[0], low=1.05),
            Claim("tokens computed again", lost, low=1000),
        ),
    )


def priority_preempt_live() -> Measured:
    """The real CPU engine, 4 slots, taken by a low class; a short high-class request every 1.5 s."""
    low = [Request(f"l{index}", 64, 160, 0.05 * index, priority=1) for index in range(12)]
    high = [Request(f"h{index}", 32, 8, 1.0 + 1.5 * index, priority=0) for index in range(8)]
    load = Load(sorted(low + high, key=lambda request: request.arrival_s))
    sizes = limits(8192, running_max=4, step_tokens_max=128)
    served = {
        preempt: serve_live(load, settings_of(rank="priority", preempt=preempt), sizes)
        for preempt in (YOUNGEST, "priority")
    }
    worst_s = [float(each.values("ttft_s", [r.id for r in high]).max()) for each in served.values()]
    return Measured(
        f"longest TTFT of the high class at a full slot cap {worst_s[0]:.2f} → {worst_s[1]:.2f} s, "
        f"{served['priority'].preemptions} times somebody was displaced, and every output the same",
        (
            Claim("longest TTFT of the high class, after / before", worst_s[1] / worst_s[0], high=0.5),
            Claim("somebody was displaced", served["priority"].preemptions, low=3),
            same_outputs(*served.values()),
        ),
    )


# ---- deadlines ------------------------------------------------------------------------------------------

TTFT_MS: Final = {"chat": 500.0, "batch": 20_000.0, "urgent": 300.0, "relaxed": 8_000.0}


def _slos(targets_ms: Mapping[str, float]) -> str:
    return "".join(f"[slo.{name}]\nttft_p99_ms = {target}\n" for name, target in targets_ms.items())


def _met(served: Ended, *classes: str, targets_ms: Mapping[str, float] = TTFT_MS) -> float:
    outcomes = [o for o in served.outcomes.values() if not classes or o.slo_class in classes]
    return float(np.mean([outcome.meets(Slo(targets_ms[outcome.slo_class])) for outcome in outcomes]))


@cache
def _deadlines(rank: str) -> Served:
    """Azure conversations at 9 requests/s; every second one is a batch job with four times the prompt."""
    draw, now_s, requests = random.Random("deadlines"), 0.0, []
    for index, (prompt, output) in enumerate(azure_lengths()[:800]):
        is_chat = draw.random() < 0.5
        slo_class = "chat" if is_chat else "batch"
        requests.append(
            Request(f"r{index}", prompt * (1 if is_chat else 4), output, now_s, slo_class=slo_class)
        )
        now_s += draw.expovariate(9.0)
    return serve(
        Load(requests), settings_of(rank=rank, file=_slos(TTFT_MS)), limits(KV_TOKENS, running_max=64)
    )


@cache
def _hopeless(rank: str) -> Served:
    """Overload: most of the work are prompts that cannot meet their target even alone, and are due first."""
    draw, requests = random.Random("hopeless"), []
    for name, rate_rps, prompt, slo_class in (("u", 1.6, 16_000, "urgent"), ("c", 16.0, 1000, "relaxed")):
        now_s = 0.0
        for index in range(int(40 * rate_rps)):
            requests.append(Request(f"{name}{index}", prompt, 16, now_s, slo_class=slo_class))
            now_s += draw.expovariate(rate_rps)
    load = Load(sorted(requests, key=lambda request: request.arrival_s))
    return serve(load, settings_of(rank=rank, file=_slos(TTFT_MS)), limits(KV_TOKENS, running_max=64))


def edf_wins() -> Measured:
    """Llama-3-8B on an H100, below saturation: TTFT targets of 0.5 and 20 s."""
    before, after = _deadlines("fcfs"), _deadlines("edf")
    met = [_met(served) for served in (before, after)]
    return Measured(
        f"requests within their TTFT target {met[0]:.1%} → {met[1]:.1%} (chat {_met(before, 'chat'):.1%} → "
        f"{_met(after, 'chat'):.1%}, batch {_met(before, 'batch'):.1%} → {_met(after, 'batch'):.1%})",
        (
            Claim("share within target, after less before", met[1] - met[0], low=0.08),
            Claim("share within target, after", met[1], low=0.95),
        ),
        (
            _quantile_chart(
                "First token of the chat class",
                "seconds from arrival, by share of requests; the target is 0.5 s",
                {
                    rank: served.values(
                        "ttft_s", [o.request_id for o in served.outcomes.values() if o.slo_class == "chat"]
                    )
                    for rank, served in (("fcfs", before), ("edf", after))
                },
            ),
        ),
    )


def edf_live() -> Measured:
    """The real CPU engine, 4 slots: 21 chats and 7 batch jobs of 800 tokens come at once, mixed.

    In the time T that FCFS takes for all of them, chats are due after 0.4 T, jobs after 2 T.
    """
    kinds = [(800, 4, "batch"), *[(48, 4, "chat")] * 3] * 7
    requests = [
        Request(f"r{index}", prompt, output, 0.0, slo_class=slo_class)
        for index, (prompt, output, slo_class) in enumerate(kinds)
    ]
    sizes = limits(16_384, running_max=4)
    before = serve_live(Load(requests), settings_of(rank="fcfs"), sizes)
    targets_ms = {"chat": 400 * before.makespan_s, "batch": 2000 * before.makespan_s}
    after = serve_live(Load(requests), settings_of(rank="edf", file=_slos(targets_ms)), sizes)
    met = [_met(served, targets_ms=targets_ms) for served in (before, after)]
    return Measured(
        f"requests within their TTFT target {met[0]:.0%} → {met[1]:.0%}",
        (
            Claim("share within target, after less before", met[1] - met[0], low=0.2),
            Claim("share within target, after", met[1], low=0.9),
        ),
    )


def edf_loses() -> Measured:
    """Overload, and what is due first cannot be met at all: it makes the others late as well."""
    before, after = _hopeless("fcfs"), _hopeless("edf")
    met = [_met(served) for served in (before, after)]
    return Measured(
        f"requests within their TTFT target {met[0]:.1%} → {met[1]:.1%}",
        (Claim("share within target, after less before", met[1] - met[0], high=-0.1),),
    )


# ---- predicted lengths ----------------------------------------------------------------------------------


@cache
def _heavy_tails(ageing_tokens_per_s: float | None) -> Served:
    """Pareto prompts; answers of about 40 tokens (chat) or 600 (report), which nobody declares.

    None: first come, first served.
    """
    draw, now_s, requests, output_lens = random.Random("tails"), 0.0, [], {}
    for index in range(900):
        slo_class, mean = ("chat", 40) if draw.random() < 0.7 else ("report", 600)
        prompt = min(20_000, int(256 * draw.paretovariate(1.2)))
        requests.append(Request(f"r{index}", prompt, 1024, now_s, slo_class=slo_class))
        output_lens[f"r{index}"] = max(1, min(1024, round(draw.lognormvariate(np.log(mean), 0.5))))
        now_s += draw.expovariate(14.0)
    sizes = limits(KV_TOKENS, running_max=SLOTS)
    load = Load(requests, output_lens)
    if ageing_tokens_per_s is None:
        return serve(load, settings_of(), sizes)
    file = f"[policies.options.shortest-predicted]\nageing_tokens_per_s = {ageing_tokens_per_s}\n"
    return serve(load, settings_of(rank="shortest-predicted", file=file), sizes)


AGEING: Final = 100.0


def shortest_wins() -> Measured:
    """Llama-3-8B on an H100, 16 slots, a queue that grows: lengths are learned from what finished."""
    before, after = _heavy_tails(None), _heavy_tails(0.0)
    ratios = {
        name: float(after.values(name).mean() / before.values(name).mean()) for name in ("ttft_s", "e2e_s")
    }
    return Measured(
        f"mean TTFT {before.values('ttft_s').mean():.1f} → {after.values('ttft_s').mean():.1f} s, "
        f"mean E2E {before.values('e2e_s').mean():.1f} → {after.values('e2e_s').mean():.1f} s",
        (
            Claim("mean TTFT, after / before", ratios["ttft_s"], high=0.5),
            Claim("mean E2E, after / before", ratios["e2e_s"], high=0.6),
        ),
        (
            _quantile_chart(
                "Latency under heavy tails",
                "seconds from arrival to finish, by share of requests",
                {
                    "fcfs": before.values("e2e_s"),
                    "shortest-predicted": after.values("e2e_s"),
                    "with ageing": _heavy_tails(AGEING).values("e2e_s"),
                },
            ),
        ),
    )


def shortest_live() -> Measured:
    """The real CPU engine, 4 slots: 24 answers of 4 tokens and 12 of 96 at once, mixed.

    They ask for no more than they get, so nothing has to be learned. The mean is compared as a share of the
    time for all.
    """
    outputs = [96, 4, 4] * 12
    load = Load([Request(f"r{index}", 8, output, 0.0) for index, output in enumerate(outputs)])
    sizes = limits(8192, running_max=4)
    served = [serve_live(load, settings_of(rank=rank), sizes) for rank in ("fcfs", "shortest-predicted")]
    places = [
        each.mean_place([f"r{i}" for i, output in enumerate(outputs) if output == 4]) for each in served
    ]
    means_s = [float(each.values("e2e_s").mean()) for each in served]
    shares = [mean_s / each.makespan_s for mean_s, each in zip(means_s, served, strict=True)]
    return Measured(
        f"mean E2E {means_s[0]:.1f} → {means_s[1]:.1f} s; mean place of the short among the first tokens "
        f"{places[0]:.0f} → {places[1]:.0f} of {len(outputs)}",
        (
            Claim("mean E2E over the time for all, after / before", shares[1] / shares[0], high=0.8),
            Claim("mean place of the short, before less after", places[0] - places[1], low=4),
        ),
    )


def shortest_loses() -> Measured:
    """The same: the longest wait until nothing shorter is left, unless they age."""
    longest_s = [float(_heavy_tails(ageing).values("e2e_s").max()) for ageing in (None, 0.0, AGEING)]
    return Measured(
        f"longest E2E {longest_s[0]:.0f} → {longest_s[1]:.0f} s; with ageing {longest_s[2]:.0f} s",
        (
            Claim("longest E2E, after / before", longest_s[1] / longest_s[0], low=1.5),
            Claim("the same with ageing, over without", longest_s[2] / longest_s[1], high=0.9),
        ),
    )


EFFECTS = (
    Effect(
        "rank",
        "priority",
        "a higher class does not queue behind a lower one (vLLM's policy `priority`)",
        priority_rank_wins,
        priority_rank_loses,
        live=priority_rank_live,
    ),
    Effect(
        "preempt",
        "priority",
        "a higher class never waits for a slot that a lower one holds (asked of vLLM in #6077 and #41951)",
        priority_preempt_wins,
        priority_preempt_loses,
        live=priority_preempt_live,
        settings={"rank": "priority"},
    ),
    Effect(
        "rank",
        "edf",
        "meets every deadline that can be met on one server; in overload a late one makes the next late "
        "(Liu and Layland, 1973)",
        edf_wins,
        edf_loses,
        live=edf_live,
    ),
    Effect(
        "rank",
        "shortest-predicted",
        "the lowest mean latency on one server where lengths are known (Schrage, 1968)",
        shortest_wins,
        shortest_loses,
        live=shortest_live,
    ),
)
