"""Fair shares between tenants: token counters, and fair queuing by job (cards uwfq; VTC, OSDI 2024)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache
from typing import Final

import numpy as np

from benchmarks.effects.effect import Claim, Effect, Measured
from benchmarks.effects.live import serve_live
from benchmarks.effects.serving import Load, Served, limits, serve, settings_of
from penstock.core.request import Request
from penstock.policies.rank.uwfq import UserWeightedFair
from penstock.policies.view import SequenceView
from penstock.replica.replica import Replica
from penstock.twin.replica import TwinReplica
from penstock.workloads.charts import Chart, Series

KV_TOKENS: Final = 400_000  # more than anybody needs here: slots are what is scarce
INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
SEEDS: Final = (1, 2, 3)
REQUESTS: Final = 900
OVERLOAD: Final = 1.4


# ---- bursts ---------------------------------------------------------------------------------------------


def _burst(rank: str) -> Served:
    """Two tenants with twenty equal requests at once, two with one each, five seconds later; one slot."""
    requests = [
        Request(f"{tenant}-{index}", 256, 200, 0.0, tenant=tenant)
        for index in range(20)
        for tenant in ("big-1", "big-2")
    ]
    requests += [Request(f"{tenant}-0", 256, 200, 5.0, tenant=tenant) for tenant in ("small-1", "small-2")]
    return serve(Load(requests), settings_of(rank=rank), limits(KV_TOKENS, running_max=1))


SMALL_ONES: Final = ["small-1-0", "small-2-0"]


# ---- overload with heavy tails --------------------------------------------------------------------------


@cache
def _sizes(seed: int) -> tuple[tuple[int, str], ...]:
    """Prompt tokens and tenant of each request: a Pareto tail, and one tenant with 60 % of them."""
    draw = random.Random(f"sizes/{seed}")
    return tuple(
        (
            min(30_000, int(128 * draw.paretovariate(1.0))),
            "heavy" if draw.random() < 0.6 else f"light-{draw.randrange(4)}",
        )
        for _ in range(REQUESTS)
    )


def _heavy_load(seed: int, tokens_per_s: float) -> Load:
    draw, now_s, requests = random.Random(f"times/{seed}"), 0.0, []
    for index, (prompt, tenant) in enumerate(_sizes(seed)):
        requests.append(Request(f"r{index}", prompt, 8, now_s, tenant=tenant))
        now_s += draw.expovariate(tokens_per_s / np.mean([size for size, _ in _sizes(seed)]))
    return Load(requests)


def _one_slot(load: Load, rank: str) -> Served:
    return serve(
        load, settings_of("vllm-v0", rank=rank), limits(KV_TOKENS, running_max=1, step_tokens_max=2048)
    )


@cache
def _capacity_tokens_per_s(seed: int) -> float:
    """At which the whole load is served when it comes at once."""
    return sum(size for size, _ in _sizes(seed)) / _one_slot(_heavy_load(seed, 1e9), "fcfs").makespan_s


@cache
def _overload(seed: int, rank: str) -> Served:
    return _one_slot(_heavy_load(seed, OVERLOAD * _capacity_tokens_per_s(seed)), rank)


def _ids(seed: int, wanted: Callable[[int, str], bool]) -> list[str]:
    return [f"r{index}" for index, row in enumerate(_sizes(seed)) if wanted(*row)]


def _mean_s(rank: str, wanted: Callable[[int, str], bool]) -> float:
    values = [_overload(seed, rank).values("e2e_s", _ids(seed, wanted)) for seed in SEEDS]
    return float(np.mean(np.concatenate(values)))


def _max_s(rank: str) -> float:
    return float(np.mean([_overload(seed, rank).values("e2e_s").max() for seed in SEEDS]))


def _median_size() -> float:
    return float(np.median([size for seed in SEEDS for size, _ in _sizes(seed)]))


def _misjudging(sigma: float) -> Callable[[UserWeightedFair, SequenceView], float]:
    """Expected work, wrong by a lognormal factor of the request's own."""
    exact = UserWeightedFair.expected_work

    def expected_work(self: UserWeightedFair, sequence: SequenceView) -> float:
        factor = random.Random(f"error/{sequence.request.id}").lognormvariate(0.0, sigma)
        return exact(self, sequence) * factor

    return expected_work


def _misjudged_mean_s(sigma: float) -> float:
    exact = UserWeightedFair.expected_work
    UserWeightedFair.expected_work = _misjudging(sigma)  # type: ignore[method-assign]
    try:
        _overload.cache_clear()
        return _mean_s("uwfq", lambda size, tenant: True)
    finally:
        UserWeightedFair.expected_work = exact  # type: ignore[method-assign]
        _overload.cache_clear()


def uwfq_wins() -> Measured:
    """Llama-3-8B on an H100, one slot. The card's tests 1 to 3, on Pareto prompts with 8 tokens of output.

    The card's single server cuts jobs into quanta; here a request keeps its slot, under both ranks.
    """
    fcfs, fair = _burst("fcfs"), _burst("uwfq")
    small = fair.values("e2e_s", SMALL_ONES).mean() / fcfs.values("e2e_s", SMALL_ONES).mean()
    overall = fair.values("e2e_s").mean() / fcfs.values("e2e_s").mean()
    misjudged_s = _misjudged_mean_s(1.0)
    half = _median_size()
    everybody = [_mean_s(rank, lambda size, tenant: True) for rank in ("vtc", "uwfq")]
    smalls = [_mean_s(rank, lambda size, tenant: size <= half) for rank in ("vtc", "uwfq")]
    lights = [_mean_s(rank, lambda size, tenant: tenant != "heavy") for rank in ("vtc", "uwfq")]
    kept = (everybody[0] - misjudged_s) / (everybody[0] - everybody[1])
    return Measured(
        f"burst: E2E of the small tenants {small:.2f}× of FCFS, mean {overall:.2f}×; overload, against "
        f"`vtc`: mean {everybody[0]:.1f} → {everybody[1]:.1f} s, small requests {smalls[0]:.1f} → "
        f"{smalls[1]:.1f} s, light tenants {lights[0]:.2f} → {lights[1]:.2f} s",
        (
            Claim("burst: mean E2E of the small tenants, against FCFS", small, high=0.15),
            Claim("burst: mean E2E of all, against FCFS", overall, low=0.95, high=1.05),
            Claim("overload: mean E2E of all, against counters", everybody[1] / everybody[0], high=0.5),
            Claim("overload: mean E2E of the smaller half", smalls[1] / smalls[0], high=0.1),
            Claim("overload: mean E2E of the light tenants", lights[1] / lights[0], high=1.1),
            Claim("lognormal errors of estimates (σ = 1): share of the gain that is kept", kept, low=0.5),
        ),
        (_latency_chart(),),
    )


def _latency_chart() -> Chart:
    fractions = [index / 100 for index in range(1, 100)]
    series = []
    for rank, tone in (("vtc", "s1"), ("uwfq", "s2")):
        values = np.concatenate([_overload(seed, rank).values("e2e_s") for seed in SEEDS])
        series.append(Series(rank, tone, [float(each) for each in np.quantile(values, fractions)]))
    return Chart(
        "Latency in overload",
        "seconds from arrival to finish, by share of requests; ρ = 1.4, Pareto prompts",
        fractions,
        series,
        lambda x: f"{x:.0%}",
        lambda y: f"{y:.2g} s",
        y_is_log=True,
    )


def uwfq_live() -> Measured:
    """The real CPU engine, 2 slots; the card's test 1 with twelve requests of each big tenant."""
    requests = [
        Request(f"{tenant}-{index}", 64, 48, 0.0, tenant=tenant)
        for index in range(12)
        for tenant in ("big-1", "big-2")
    ]
    requests += [Request(f"{tenant}-0", 64, 48, 1.0, tenant=tenant) for tenant in ("small-1", "small-2")]
    sizes = limits(8192, running_max=2, step_tokens_max=128)
    served = {rank: serve_live(Load(requests), settings_of(rank=rank), sizes) for rank in ("fcfs", "uwfq")}
    small_s = [float(each.values("e2e_s", SMALL_ONES).mean()) for each in served.values()]
    all_s = [float(each.values("e2e_s").mean()) for each in served.values()]
    return Measured(
        f"burst: mean E2E of the small tenants {small_s[0]:.1f} → {small_s[1]:.1f} s, of all "
        f"{all_s[0]:.1f} → {all_s[1]:.1f} s",
        (Claim("mean E2E of the small tenants, against FCFS", small_s[1] / small_s[0], high=0.4),),
    )


def uwfq_loses() -> Measured:
    """The same overload: who has the largest jobs pays for everybody else's latency."""
    ratio = _max_s("uwfq") / _max_s("vtc")
    return Measured(
        f"longest E2E {_max_s('vtc'):.0f} → {_max_s('uwfq'):.0f} s",
        (Claim("longest E2E, against counters", ratio, low=1.5),),
    )


# ---- token counters -------------------------------------------------------------------------------------

LONG_PROMPT, LONG_OUTPUT = 1024, 256
SLOTS: Final = 16
VTC_KV_TOKENS: Final = 24_000


class _Service:
    """Weighted tokens of each tenant, by looking at the replica after every plan, not at a policy."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.gaps: list[float] = []  # of the two tenants, while both have work waiting
        self.seen: dict[str, tuple[str, float]] = {}

    def look(self, running: Iterable[SequenceView], waiting: set[str], now_s: float) -> None:
        """`waiting`: the tenants that have work there which has not begun."""
        for sequence in running:
            request = sequence.request
            # Output counts to the end as soon as it has left: nobody is preempted here.
            tokens = INPUT_WEIGHT * request.prompt_len + OUTPUT_WEIGHT * sequence.output_len
            self.seen[request.id] = (request.tenant, tokens)
        if waiting != {"greedy", "modest"}:
            return
        total = {"greedy": 0.0, "modest": 0.0}
        for tenant, tokens in self.seen.values():
            total[tenant] += tokens
        self.times_s.append(now_s)
        self.gaps.append(total["greedy"] - total["modest"])

    @property
    def spread(self) -> float:
        """The largest difference of the two in any interval in which both were backlogged."""
        return max(self.gaps) - min(self.gaps)


def _competition(rank: str) -> tuple[_Service, Served]:
    """One tenant floods at once, the other sends a little more than its share: both have work waiting."""
    greedy = [
        Request(f"g{index}", LONG_PROMPT, LONG_OUTPUT, 0.01 * index, tenant="greedy") for index in range(120)
    ]
    modest = [
        Request(f"m{index}", LONG_PROMPT // 4, LONG_OUTPUT // 2, 0.05 * index, tenant="modest")
        for index in range(240)
    ]
    load = Load(sorted(greedy + modest, key=lambda request: request.arrival_s))
    service = _Service()
    sizes = limits(VTC_KV_TOKENS, running_max=SLOTS)

    def look(twin: TwinReplica) -> None:
        replica = twin.replica
        service.look(replica.running, {each.request.tenant for each in replica.waiting}, twin.now_s)

    return service, serve(load, settings_of(rank=rank), sizes, each_step=look)


def vtc_wins() -> Measured:
    """Llama-3-8B on an H100, 16 slots, 24,000 tokens of KV; both tenants are backlogged.

    The bound is the paper's theorem: 2·max(input weight · longest prompt, output weight · KV tokens).
    """
    bound = 2 * max(INPUT_WEIGHT * LONG_PROMPT, OUTPUT_WEIGHT * SLOTS * (LONG_PROMPT + LONG_OUTPUT))
    services, modest_s = {}, {}
    for rank in ("fcfs", "vtc"):
        services[rank], served = _competition(rank)
        ids = [each for each, outcome in served.outcomes.items() if outcome.tenant == "modest"]
        modest_s[rank] = float(served.values("ttft_s", ids).mean())
    before, after = services["fcfs"].spread, services["vtc"].spread
    return Measured(
        f"largest difference of service between backlogged tenants {before:,.0f} → {after:,.0f} weighted "
        f"tokens (bound {bound:,.0f}); mean TTFT of the modest one {modest_s['fcfs']:.1f} → "
        f"{modest_s['vtc']:.1f} s",
        (
            Claim("difference of service over the paper's bound", after / bound, high=1.0),
            Claim("the same under FCFS", before / bound, low=1.0),
            Claim(
                "mean TTFT of the modest tenant, after / before", modest_s["vtc"] / modest_s["fcfs"], high=0.5
            ),
        ),
        (_gap_chart(services),),
    )


def vtc_live() -> Measured:
    """The real CPU engine, 4 slots: 24 requests of one tenant, and 20 smaller ones of another, all at once.

    The bound is that of four requests, since no more KV is ever in use.
    """
    slots, prompt, output = 4, 64, 24
    bound = 2 * max(INPUT_WEIGHT * prompt, OUTPUT_WEIGHT * slots * (prompt + output))
    requests = [Request(f"g{index}", prompt, output, 0.0, tenant="greedy") for index in range(24)]
    requests += [Request(f"m{index}", prompt // 4, output // 2, 0.0, tenant="modest") for index in range(20)]
    spreads, places = [], []
    for rank in ("fcfs", "vtc"):
        service = _Service()

        def look(
            replica: Replica, plan: object, result: object, now_s: float, to: _Service = service
        ) -> None:
            waiting = {each.tenant for each in requests if each.id not in to.seen}
            to.look(replica.running, waiting, now_s)

        served = serve_live(
            Load(requests), settings_of(rank=rank), limits(8192, running_max=slots), each_step=look
        )
        spreads.append(service.spread)
        places.append(served.mean_place([f"m{index}" for index in range(20)]))
    return Measured(
        f"largest difference of service between backlogged tenants {spreads[0]:,.0f} → {spreads[1]:,.0f} "
        f"weighted tokens (bound {bound:,.0f}); mean place of the modest one among the first tokens "
        f"{places[0]:.0f} → {places[1]:.0f} of {len(requests)}",
        (
            Claim("difference of service over the paper's bound", spreads[1] / bound, high=1.0),
            Claim("the same under FCFS", spreads[0] / bound, low=1.0),
        ),
    )


def _gap_chart(services: dict[str, _Service]) -> Chart:
    end_s = min(service.times_s[-1] for service in services.values())
    xs = [end_s * index / 100 for index in range(101)]
    series = [
        Series(
            rank, tone, [float(each) for each in np.interp(xs, services[rank].times_s, services[rank].gaps)]
        )
        for rank, tone in (("fcfs", "s1"), ("vtc", "s2"))
    ]
    return Chart(
        "Service ahead of the other tenant",
        "weighted tokens of the greedy tenant less those of the modest one, over time",
        xs,
        series,
        lambda x: f"{x:.1f} s",
        lambda y: f"{y:,.0f}",
    )


def vtc_loses() -> Measured:
    """Overload with heavy tails, one tenant with 60 %: its small requests wait as long as its big ones."""
    half = _median_size()
    small = [
        _mean_s(rank, lambda size, tenant: tenant == "heavy" and size <= half) for rank in ("fcfs", "vtc")
    ]
    return Measured(
        f"mean E2E of the heavy tenant's small requests {small[0]:.1f} → {small[1]:.1f} s",
        (Claim("E2E of the heavy tenant's small requests, after / before", small[1] / small[0], low=1.2),),
    )


EFFECTS = (
    Effect(
        "rank",
        "uwfq",
        "small tenants ≤ 0.15× of FCFS in a burst at equal mean; in overload mean ≤ 0.5× and small requests "
        "≤ 0.1× of token counters (card uwfq, its own single-server check)",
        uwfq_wins,
        uwfq_loses,
        live=uwfq_live,
    ),
    Effect(
        "rank",
        "vtc",
        "backlogged tenants' service differs by at most 2·max(wp·Linput, wq·M), theorem 4.4 of the paper",
        vtc_wins,
        vtc_loses,
        live=vtc_live,
    ),
)
