"""What a run showed, from `RequestOutcome`s alone: the same report for a live replay and for the twin.

Definitions are those of `core/metrics.py`. Requests that arrived during the warm-up, and those that were
still running when somebody interrupted the run, are counted and otherwise left out. Every other request
that got no answer is lost, and a miss for every SLO. `docs/formats.md` documents the JSON.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock import __version__
from penstock.core.metrics import Goodput, RequestOutcome, Slo, goodput
from penstock.core.reasons import FinishReason
from penstock.workloads.server_metrics import ServerSeries
from penstock.workloads.timeline import Timeline, timeline_of

SCHEMA = "penstock-report"
SCHEMA_VERSION = 1
INTERRUPTED = "interrupted"  # the error code of requests that the client itself gave up
CDF_FRACTIONS = (*(percent / 100 for percent in range(100)), 0.995, 0.999, 1.0)
ERROR_CODES_MAX = 50

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution in numbers; percentiles interpolate linearly."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Floats) -> Summary | None:
        if not len(values):
            return None
        p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
        return cls(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


@dataclass(frozen=True, slots=True)
class ClassAttainment:
    """One class against its SLO. A fraction is None where the class does not carry that target."""

    slo_class: str
    slo: Slo
    requests: int
    attained: int
    attained_frac: float
    goodput_rps: float
    ttft_attained_frac: float | None
    tpot_attained_frac: float | None
    e2e_attained_frac: float | None


@dataclass(frozen=True, slots=True)
class ClientFacts:
    """What the load generator itself did; None in the report of a simulation."""

    lag_ms: Summary | None  # sent − due; part of every TTFT, since arrivals are the due instants
    in_flight_max: int
    cap_waits: int
    prompts: str  # how prompts were made, in words
    prompt_length_mismatches: int  # the server counted another prompt length than was asked for
    output_length_mismatches: int
    tokens_per_chunk: float | None  # above 1: several tokens arrive at once, and ITL is between chunks


@dataclass(frozen=True, slots=True)
class Counts:
    """`measured` = answered + lost, without warm-up and interrupted requests."""

    total: int
    measured: int
    answered: int
    lost: int
    warmup: int
    interrupted: int
    by_outcome: dict[str, int]
    errors: dict[str, int]


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second. Requested and realised are over the arrivals, the others over the measured span.

    Prompt tokens count the answered requests' prompts, cached ones included.
    """

    requested_rps: float | None
    realised_rps: float | None
    answered_rps: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sums over the measured requests."""

    prompt: int
    cached: int
    output: int


@dataclass(frozen=True, slots=True)
class Energy:
    """What a simulation's replicas drew while they computed, warm-up included; idle power is not in it.

    The quotients are over every output token and every answered request of the run, None where there is none.
    """

    busy_joules: float
    busy_s: float  # of all replicas together
    joules_per_output_token: float | None
    joules_per_request: float | None
    power_status: str  # how the power figures are known: `measured`, `published`, ...

    @classmethod
    def of(
        cls, busy_joules: float, busy_s: float, outcomes: Sequence[RequestOutcome], power_status: str
    ) -> Energy:
        output_tokens = sum(outcome.output_tokens for outcome in outcomes)
        answered = sum(outcome.is_answered for outcome in outcomes)
        return cls(
            busy_joules,
            busy_s,
            busy_joules / output_tokens if output_tokens else None,
            busy_joules / answered if answered else None,
            power_status,
        )


@dataclass(slots=True)
class ReportInput:
    """Everything a report is made of. `sent_s` is parallel to `outcomes`, None in the twin."""

    kind: str  # `replay` or `simulate`
    title: str
    outcomes: Sequence[RequestOutcome]
    slos: Mapping[str, Slo]  # by class
    warmup_s: float = 0.0
    sent_s: Sequence[float] | None = None
    client: ClientFacts | None = None
    server: ServerSeries | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    interrupted: bool = False
    energy: Energy | None = None  # None in a replay, and where a profile knows no power


@dataclass(frozen=True, slots=True)
class Report:
    """The report. `to_json` is the documented form; `report_html` and `report_table` show it."""

    kind: str
    title: str
    span_s: float
    warmup_s: float
    interrupted: bool
    requests: Counts
    rates: Rates
    tokens: Tokens
    latency_ms: dict[str, Summary | None]  # ttft, itl, tpot, e2e
    goodput: Goodput
    classes: list[ClassAttainment]
    cdf_ms: dict[str, list[float]]  # ttft, itl, e2e at CDF_FRACTIONS; empty without values
    timeline: Timeline
    client: ClientFacts | None
    server: ServerSeries | None
    configuration: dict[str, Any]
    notes: list[str]
    energy: Energy | None = None

    @classmethod
    def build(cls, given: ReportInput) -> Report:
        """Pure. The outcomes may be in any order and may be none at all."""
        kept = [outcome for outcome in given.outcomes if outcome.error_code != INTERRUPTED]
        measured = [outcome for outcome in kept if outcome.arrival_s >= given.warmup_s]
        span_s = _span_s(measured)
        samples_ms = _samples_ms(measured)
        slos = {name: slo for name, slo in given.slos.items() if not slo.is_empty}
        return cls(
            kind=given.kind,
            title=given.title,
            span_s=span_s,
            warmup_s=given.warmup_s,
            interrupted=given.interrupted,
            requests=_counts(given.outcomes, kept, measured),
            rates=_rates(given, measured, span_s),
            tokens=_tokens(measured),
            latency_ms={name: Summary.of(values) for name, values in samples_ms.items()},
            goodput=goodput(measured, slos, span_s),
            classes=[_attainment(name, slo, measured, span_s) for name, slo in sorted(slos.items())],
            cdf_ms={name: _cdf(samples_ms[name]) for name in ("ttft", "itl", "e2e")},
            timeline=timeline_of(given.outcomes),
            client=given.client,
            server=given.server,
            configuration=dict(given.configuration),
            notes=list(given.notes),
            energy=given.energy,
        )

    def to_json(self) -> dict[str, Any]:
        head = {"schema": SCHEMA, "version": SCHEMA_VERSION, "penstock_version": __version__}
        body = asdict(self)
        body["goodput"] |= {
            "goodput_rps": self.goodput.goodput_rps,
            "attained_frac": self.goodput.attained_frac,
        }
        return head | body | {"cdf_fractions": list(CDF_FRACTIONS)}


def outcome_row(outcome: RequestOutcome, sent_s: float | None) -> dict[str, Any]:
    """One line of `requests.jsonl`. Times in seconds on the run's clock, latencies in milliseconds."""
    tpot_s, ttft_s = outcome.tpot_s, outcome.ttft_s
    return {
        "request_id": outcome.request_id,
        "arrival_s": round(outcome.arrival_s, 6),
        "sent_s": None if sent_s is None else round(sent_s, 6),
        "finish_s": round(outcome.finish_s, 6),
        "outcome": outcome.finish,
        "error_code": outcome.error_code,
        "tenant": outcome.tenant,
        "slo_class": outcome.slo_class,
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "cached_tokens": outcome.cached_tokens,
        "ttft_ms": None if ttft_s is None else round(ttft_s * 1e3, 3),
        "tpot_ms": None if tpot_s is None else round(tpot_s * 1e3, 3),
        "e2e_ms": round(outcome.e2e_s * 1e3, 3),
        "itl_ms_max": round(max(outcome.itl_s) * 1e3, 3) if len(outcome.itl_s) else None,
    }


def _span_s(measured: Sequence[RequestOutcome]) -> float:
    """From the first arrival to the last finish."""
    if not measured:
        return 0.0
    return max(outcome.finish_s for outcome in measured) - min(outcome.arrival_s for outcome in measured)


def _counts(
    outcomes: Sequence[RequestOutcome], kept: Sequence[RequestOutcome], measured: Sequence[RequestOutcome]
) -> Counts:
    by_outcome = Counter(str(outcome.finish) for outcome in measured)
    errors = Counter(outcome.error_code or "unknown" for outcome in measured if not outcome.is_answered)
    answered = sum(outcome.is_answered for outcome in measured)
    return Counts(
        total=len(outcomes),
        measured=len(measured),
        answered=answered,
        lost=len(measured) - answered,
        warmup=len(kept) - len(measured),
        interrupted=len(outcomes) - len(kept),
        by_outcome={str(reason): by_outcome[reason] for reason in FinishReason},
        errors=dict(errors.most_common(ERROR_CODES_MAX)),
    )


def _rates(given: ReportInput, measured: Sequence[RequestOutcome], span_s: float) -> Rates:
    answered = [outcome for outcome in measured if outcome.is_answered]
    per_s = 1 / span_s if span_s > 0 else 0.0
    sent_s = None
    if given.sent_s is not None:
        pairs = zip(given.outcomes, given.sent_s, strict=True)
        sent_s = [sent for outcome, sent in pairs if outcome.arrival_s >= given.warmup_s]
    due_s = [outcome.arrival_s for outcome in given.outcomes if outcome.arrival_s >= given.warmup_s]
    return Rates(
        requested_rps=_arrival_rate(due_s),
        realised_rps=_arrival_rate(due_s if sent_s is None else sent_s),
        answered_rps=len(answered) * per_s,
        prompt_tokens_per_s=sum(outcome.prompt_tokens for outcome in answered) * per_s,
        output_tokens_per_s=sum(outcome.output_tokens for outcome in measured) * per_s,
    )


def _arrival_rate(instants_s: Sequence[float]) -> float | None:
    """(n - 1) / (last - first); None below two arrivals."""
    if len(instants_s) < 2:
        return None
    span_s = max(instants_s) - min(instants_s)
    return (len(instants_s) - 1) / span_s if span_s > 0 else None


def _tokens(measured: Sequence[RequestOutcome]) -> Tokens:
    return Tokens(
        prompt=sum(outcome.prompt_tokens for outcome in measured if outcome.is_answered),
        cached=sum(outcome.cached_tokens for outcome in measured if outcome.is_answered),
        output=sum(outcome.output_tokens for outcome in measured),
    )


def _samples_ms(measured: Sequence[RequestOutcome]) -> dict[str, Floats]:
    """Latencies of the answered requests; an error's latency would flatter or spoil them."""
    answered = [outcome for outcome in measured if outcome.is_answered]
    ttft = [outcome.ttft_s for outcome in answered if outcome.ttft_s is not None]
    tpot = [tpot_s for outcome in answered if (tpot_s := outcome.tpot_s) is not None]
    gaps = [np.asarray(outcome.itl_s, dtype=np.float32) for outcome in answered if len(outcome.itl_s)]
    return {
        "ttft": np.array(ttft) * 1e3,
        "itl": np.concatenate(gaps).astype(np.float64) * 1e3 if gaps else np.array([]),
        "tpot": np.array(tpot) * 1e3,
        "e2e": np.array([outcome.e2e_s for outcome in answered]) * 1e3,
    }


def _cdf(values: Floats) -> list[float]:
    return [float(value) for value in np.quantile(values, CDF_FRACTIONS)] if len(values) else []


def _attainment(name: str, slo: Slo, measured: Sequence[RequestOutcome], span_s: float) -> ClassAttainment:
    of_class = [outcome for outcome in measured if outcome.slo_class == name]

    def part(single: Slo) -> float | None:
        return None if single.is_empty else goodput(of_class, {name: single}, span_s).attained_frac

    whole = goodput(of_class, {name: slo}, span_s)
    return ClassAttainment(
        slo_class=name,
        slo=slo,
        requests=whole.requests,
        attained=whole.attained,
        attained_frac=whole.attained_frac,
        goodput_rps=whole.goodput_rps,
        ttft_attained_frac=part(Slo(ttft_ms=slo.ttft_ms)),
        tpot_attained_frac=part(Slo(tpot_ms=slo.tpot_ms)),
        e2e_attained_frac=part(Slo(e2e_ms=slo.e2e_ms)),
    )
