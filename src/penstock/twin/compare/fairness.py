"""How evenly tenants were served while they competed. Pure.

Service is counted in tokens delivered until the last arrival: later everybody gets what is left, under any
policy. A request's prompt counts when its first token comes, its output evenly from the first token to the
last. Where tenants have weights, tokens over weight are compared. Jain's index is (Σx)² / (n Σx²): 1 when all
x are equal, 1/n when one tenant has everything. What a tenant is due is its max-min share of all that was
delivered: by weight, nobody more than it asked for, and what one does not ask for goes to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from penstock.core.metrics import RequestOutcome

TENANTS_SHOWN = 50


@dataclass(slots=True)
class TenantService:
    """One tenant: tokens asked for by answered and lost requests alike, and tokens it got in time."""

    tenant: str
    requests: int = 0
    asked_tokens: int = 0
    service_tokens: float = 0.0
    weight: float = 1.0

    @property
    def served_frac(self) -> float:
        return self.service_tokens / self.asked_tokens if self.asked_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Fairness:
    """Over all tenants: of tokens over weight, and of the share of what each asked for. None below two."""

    tenants: int
    tokens_max_over_min: float | None  # None as well where some tenant got nothing
    tokens_jain: float | None
    served_frac_jain: float | None
    due_frac_min: float | None  # of what it was due, the least that any tenant got; above 1 nobody goes short
    largest: list[TenantService]  # those that asked for the most, TENANTS_SHOWN at most


def fairness(
    outcomes: Sequence[RequestOutcome],
    asked_output_tokens: Sequence[int],
    weight_of: Callable[[str], float] = lambda tenant: 1.0,
) -> Fairness:
    """`asked_output_tokens` is parallel to `outcomes`: what a lost request would have been given."""
    until_s = max((outcome.arrival_s for outcome in outcomes), default=0.0)
    found: dict[str, TenantService] = {}
    for outcome, asked in zip(outcomes, asked_output_tokens, strict=True):
        if (service := found.get(outcome.tenant)) is None:
            service = TenantService(outcome.tenant, weight=weight_of(outcome.tenant))
            found[outcome.tenant] = service
        service.requests += 1
        service.asked_tokens += outcome.prompt_tokens + asked
        service.service_tokens += delivered_tokens(outcome, until_s)
    tokens = [service.service_tokens / service.weight for service in found.values()]
    shares = [service.served_frac for service in found.values()]
    largest = sorted(found.values(), key=lambda service: (-service.asked_tokens, service.tenant))
    several = len(tokens) > 1
    return Fairness(
        tenants=len(tokens),
        tokens_max_over_min=max(tokens) / min(tokens) if several and min(tokens) > 0 else None,
        tokens_jain=jain(tokens) if several else None,
        served_frac_jain=jain(shares) if several else None,
        due_frac_min=_due_frac_min(list(found.values())) if several else None,
        largest=largest[:TENANTS_SHOWN],
    )


def dues_tokens(services: Sequence[TenantService]) -> list[float]:
    """What each is due of all that they got together, in the same order."""
    left, weights = sum(service.service_tokens for service in services), sum(s.weight for s in services)
    dues = [0.0] * len(services)
    for index in sorted(range(len(services)), key=lambda i: services[i].asked_tokens / services[i].weight):
        service = services[index]
        dues[index] = min(float(service.asked_tokens), left * service.weight / weights)
        left -= dues[index]
        weights -= service.weight
        if weights <= 0.0:
            break
    return dues


def _due_frac_min(services: Sequence[TenantService]) -> float | None:
    pairs = zip(services, dues_tokens(services), strict=True)
    return min((service.service_tokens / due for service, due in pairs if due > 0.0), default=None)


def delivered_tokens(outcome: RequestOutcome, until_s: float) -> float:
    """Prompt and output tokens of one request that were done by `until_s`."""
    first_s, last_s = outcome.first_token_s, outcome.last_token_s
    if first_s is None or first_s > until_s:
        return 0.0
    later = outcome.output_tokens - 1
    share = 1.0 if last_s is None or last_s <= until_s else (until_s - first_s) / (last_s - first_s)
    return outcome.prompt_tokens + 1 + later * share


def jain(values: Iterable[float]) -> float | None:
    """None where nothing was given at all."""
    listed = list(values)
    squares = sum(value * value for value in listed)
    return sum(listed) ** 2 / (len(listed) * squares) if squares > 0 else None
