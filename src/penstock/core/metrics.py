"""What Penstock measures, defined once for the live system, the replay client and the twin.

Instants of a request, all on one clock: `arrival` (the gateway has the whole request; in the replay client,
the moment it was due to be sent), `first` and `last` (its first and last output token), `finish`.

    TTFT   first - arrival                             queue wait is part of it
    ITL    gaps between consecutive tokens             one value per token after the first
    TPOT   (last - first) / (tokens - 1)               undefined for one token
    E2E    finish - arrival = queue + prefill + decode + preempted + gateway overhead
    goodput  requests per second that meet every SLO they carry; refused and failed ones count as misses
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from penstock.core.reasons import FinishReason


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets of one class, in milliseconds; None means the class does not carry that target."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def is_empty(self) -> bool:
        return self.ttft_ms is None and self.tpot_ms is None and self.e2e_ms is None


@dataclass(slots=True)
class RequestOutcome:
    """The measured life of one request. Instants are seconds on one clock; None where it never came."""

    request_id: str
    arrival_s: float
    finish: FinishReason
    finish_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    itl_s: Sequence[float] = field(default_factory=list)
    tenant: str = "default"
    slo_class: str = "default"
    error_code: str | None = None

    @property
    def is_answered(self) -> bool:
        return self.finish in (FinishReason.STOP, FinishReason.LENGTH)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.finish_s - self.arrival_s

    def meets(self, slo: Slo) -> bool:
        """Whether it was answered within every target. A one-token answer has no TPOT to miss."""
        if not self.is_answered:
            return False
        measured = ((self.ttft_s, slo.ttft_ms), (self.tpot_s, slo.tpot_ms), (self.e2e_s, slo.e2e_ms))
        return all(
            target_ms is None or value_s is None or value_s * 1e3 <= target_ms
            for value_s, target_ms in measured
        )


@dataclass(frozen=True, slots=True)
class Goodput:
    """Attainment of a set of requests over a span."""

    requests: int
    attained: int
    span_s: float

    @property
    def attained_frac(self) -> float:
        return self.attained / self.requests if self.requests else 0.0

    @property
    def goodput_rps(self) -> float:
        return self.attained / self.span_s if self.span_s > 0 else 0.0


def goodput(outcomes: Iterable[RequestOutcome], slos: dict[str, Slo], span_s: float) -> Goodput:
    """Count the requests whose class has an SLO, and those that met it. Other classes are left out."""
    requests = attained = 0
    for outcome in outcomes:
        slo = slos.get(outcome.slo_class)
        if slo is None or slo.is_empty:
            continue
        requests += 1
        attained += outcome.meets(slo)
    return Goodput(requests, attained, span_s)


# Histogram edges shared by every latency metric of a kind (vLLM's ranges, so that dashboards carry over).
TTFT_EDGES_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TPOT_EDGES_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_EDGES_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKEN_EDGES = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
