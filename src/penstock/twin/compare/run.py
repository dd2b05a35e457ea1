"""The sweep: every stack at every rate, in the twin, and the search for rates that show saturation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from penstock.core.metrics import Goodput, RequestOutcome, Slo, goodput
from penstock.core.settings import Settings
from penstock.policies.stack import terms_of
from penstock.replica.limits import ReplicaLimits
from penstock.twin.build import Machine
from penstock.twin.compare.fairness import Fairness, fairness
from penstock.twin.compare.pairs import Group, groups_of
from penstock.twin.feasible import Infeasible
from penstock.twin.requests import number_of
from penstock.twin.simulate import Clients, series_of, simulate
from penstock.workloads.report import CDF_FRACTIONS, Floats, Summary
from penstock.workloads.server_metrics import ServerSeries
from penstock.workloads.trace import TraceRow

RATES_MAX = 12
RATE_LOW, RATE_HIGH = 2.0**-8, 2.0**12
COLLAPSED_FRAC = 0.5  # saturated: fewer than half of the requests meet their SLO


@dataclass(frozen=True, slots=True)
class Contender:
    """A stack, ready to run. `infeasible` says which targets it misses even with one request alone."""

    name: str
    settings: Settings
    limits: ReplicaLimits
    machine: Machine
    infeasible: tuple[Infeasible, ...] = ()

    def is_hopeless(self, slos: dict[str, Slo]) -> bool:
        """Whether every class that carries an SLO has a target that can never be met."""
        carrying = {name for name, slo in slos.items() if not slo.is_empty}
        return bool(carrying) and {target.slo_class for target in self.infeasible} >= carrying


@dataclass(frozen=True, slots=True)
class Bench:
    """What is the same for all stacks. `rows` makes the trace at a rate, anew each time."""

    rows: Callable[[float], Iterable[TraceRow]]
    slos: dict[str, Slo]
    rate_scale: float = 1.0  # already in the rows at rate 1
    replicas: int = 1
    closed_loop: bool = False
    concurrency_max: int | None = None
    asked_tokens: int | None = None
    warmup_s: float = 0.0


@dataclass(slots=True)
class Run:
    """One stack at one rate. Latencies in milliseconds, of answered requests."""

    stack: str
    rate: float  # a multiple of the trace's own
    requests: int
    answered: int
    requested_rps: float | None
    output_tokens_per_s: float
    goodput: Goodput
    latency_ms: dict[str, Summary | None]  # ttft, tpot, e2e
    cdf_ms: dict[str, list[float]]
    preemptions: int
    kv_usage_mean: float
    kv_usage_max: float
    steps_out_of_range: int
    fairness: Fairness
    server: ServerSeries
    against_first: list[Group] = field(default_factory=list)  # empty for the first stack itself


def sweep(
    bench: Bench,
    contenders: Sequence[Contender],
    rates: Sequence[float] | None,
    on_run: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Every stack at every rate, by rate; `rates` None searches them. Deterministic.

    The search doubles the rate until every stack has collapsed (and halves it while one has already at the
    trace's own rate), then looks between the last good and the first bad rate of each. It never makes
    more than RATES_MAX rates.
    """
    runs: list[Run] = []

    def at(rate: float) -> list[Run]:
        found = _at_rate(bench, contenders, rate, on_run)
        runs.extend(found)
        return found

    if rates is not None:
        for rate in rates:
            at(rate)
    else:
        _search(at, runs)
    return sorted(runs, key=lambda run: run.rate)  # stable: stacks stay in order


def focus_rate(runs: Sequence[Run]) -> float:
    """The rate whose pictures tell the most: the highest at which some stack has not collapsed."""
    good = [run.rate for run in runs if not _has_collapsed(run)]
    return max(good) if good else min(run.rate for run in runs)


def _search(at: Callable[[float], list[Run]], runs: list[Run]) -> None:
    rate, first = 1.0, at(1.0)
    if all(_has_collapsed(run) for run in first):
        while len({run.rate for run in runs}) < RATES_MAX // 2 and rate > RATE_LOW:
            rate /= 2
            if not any(_has_collapsed(run) for run in at(rate)):
                break
    else:
        while len({run.rate for run in runs}) < RATES_MAX - 3 and rate < RATE_HIGH:
            rate *= 2
            if all(_has_collapsed(run) for run in at(rate)):
                break
    for between in sorted({sqrt(low * high) for low, high in _knees(runs)}):
        if len({run.rate for run in runs}) < RATES_MAX:
            at(between)


def _knees(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Per stack, its last good and first bad rate, where it has both."""
    found = []
    for name in dict.fromkeys(run.stack for run in runs):
        own = [run for run in runs if run.stack == name]
        bad = min((run.rate for run in own if _has_collapsed(run)), default=None)
        good = [run.rate for run in own if bad is not None and run.rate < bad]
        if bad is not None and good:
            found.append((max(good), bad))
    return found


def _has_collapsed(run: Run) -> bool:
    if run.goodput.requests:
        return run.goodput.attained_frac < COLLAPSED_FRAC
    return run.answered < COLLAPSED_FRAC * run.requests  # no class carries an SLO


def _at_rate(
    bench: Bench, contenders: Sequence[Contender], rate: float, on_run: Callable[[Run], None]
) -> list[Run]:
    first: dict[str, RequestOutcome] | None = None
    found = []
    for contender in contenders:
        run, outcomes = run_once(bench, contender, rate)
        if first is None:
            first = outcomes
        else:
            run.against_first = groups_of(first, outcomes, bench.slos)
        found.append(run)
        on_run(run)
    return found


def run_once(bench: Bench, contender: Contender, rate: float) -> tuple[Run, dict[str, RequestOutcome]]:
    """One stack at one rate; the outcomes of the measured requests by id."""
    outcomes: list[RequestOutcome] = []
    asked: list[int] = []  # output tokens, by request number
    fleet = simulate(
        _noting(bench.rows(rate), asked),
        contender.settings,
        contender.limits,
        contender.machine.cost,
        outcomes.append,
        replicas=bench.replicas,
        path=contender.machine.path,
        clients=Clients(
            bench.closed_loop, bench.rate_scale * rate, bench.concurrency_max, bench.asked_tokens
        ),
    )
    measured = [outcome for outcome in outcomes if outcome.arrival_s >= bench.warmup_s]
    server = series_of(fleet)
    usage = [value for value in server.kv_usage_frac if value is not None]
    samples = _samples_ms(measured)
    span_s = _span_s([outcome.arrival_s for outcome in measured], [outcome.finish_s for outcome in measured])
    arrivals_s = _span_s([outcome.arrival_s for outcome in measured])
    run = Run(
        stack=contender.name,
        rate=rate,
        requests=len(measured),
        answered=sum(outcome.is_answered for outcome in measured),
        requested_rps=(len(measured) - 1) / arrivals_s if arrivals_s > 0 else None,
        output_tokens_per_s=sum(o.output_tokens for o in measured) / span_s if span_s > 0 else 0.0,
        goodput=goodput(measured, bench.slos, span_s),
        latency_ms={name: Summary.of(values) for name, values in samples.items()},
        cdf_ms={
            name: [float(value) for value in np.quantile(values, CDF_FRACTIONS)] if len(values) else []
            for name, values in samples.items()
        },
        preemptions=int(server.counters["preemptions"]),
        kv_usage_mean=float(np.mean(usage)),
        kv_usage_max=float(np.max(usage)),
        steps_out_of_range=sum(twin.executor.steps_out_of_range for twin in fleet),
        fairness=fairness(
            measured,
            [asked[number_of(outcome.request_id)] for outcome in measured],
            terms_of(contender.settings).weight,
        ),
        server=server,
    )
    return run, {outcome.request_id: outcome for outcome in measured}


def _noting(rows: Iterable[TraceRow], asked: list[int]) -> Iterable[TraceRow]:
    """Pass the rows on that are sent, and note their output lengths in order."""
    for row in rows:
        if not row.failed:
            asked.append(row.output_tokens)
            yield row


def _samples_ms(measured: Sequence[RequestOutcome]) -> dict[str, Floats]:
    answered = [outcome for outcome in measured if outcome.is_answered]
    values: dict[str, list[float | None]] = {
        "ttft": [outcome.ttft_s for outcome in answered],
        "tpot": [outcome.tpot_s for outcome in answered],
        "e2e": [outcome.e2e_s for outcome in answered],
    }
    return {name: np.array([v for v in found if v is not None]) * 1e3 for name, found in values.items()}


def _span_s(starts_s: Sequence[float], ends_s: Sequence[float] | None = None) -> float:
    return max(ends_s or starts_s) - min(starts_s) if starts_s else 0.0
