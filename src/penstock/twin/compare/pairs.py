"""Who gains and who loses by a change of stack: the same request under both, grouped. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from penstock.core.metrics import RequestOutcome, Slo

SAME_FRAC = 0.05  # a whole request that takes within 5 % of before …
SAME_S = 0.005  # … or within 5 ms is neither gained nor lost
GROUPS_MAX = 20  # of one kind: those with the most requests
LENGTH_EDGES = (256, 1024, 4096, 16384)


@dataclass(slots=True)
class Group:
    """Requests that share a class, a tenant or a range of lengths; E2E against the first stack."""

    kind: str  # `all`, `class`, `tenant`, `prompt` or `output`
    name: str
    requests: int
    gained: int
    lost: int
    slo_gained: int  # met only now
    slo_lost: int  # met only before
    e2e_ratio_p50: float | None  # over those that both answered; below 1 is faster
    ttft_ratio_p50: float | None


def groups_of(
    before: Mapping[str, RequestOutcome], after: Mapping[str, RequestOutcome], slos: Mapping[str, Slo]
) -> list[Group]:
    """Every grouping of the requests that both runs sent."""
    pairs = [(before[key], after[key]) for key in before if key in after]
    found = [_group("all", "all requests", pairs, slos)] if pairs else []
    labels: dict[str, Callable[[RequestOutcome], str]] = {
        "class": lambda outcome: outcome.slo_class,
        "tenant": lambda outcome: outcome.tenant,
        "prompt": lambda outcome: length_label(outcome.prompt_tokens),
        "output": lambda outcome: length_label(outcome.output_tokens),
    }
    for kind, label in labels.items():
        parts: dict[str, list[tuple[RequestOutcome, RequestOutcome]]] = {}
        for pair in pairs:
            answered = pair[0] if pair[0].is_answered else pair[1]  # a refused one has no output length
            parts.setdefault(label(answered), []).append(pair)
        if len(parts) > 1:
            named = sorted(parts.items(), key=lambda part: (-len(part[1]), part[0]))[:GROUPS_MAX]
            found += [_group(kind, name, part, slos) for name, part in named]
    return found


def length_label(tokens: int) -> str:
    """`≤ 256`, `257 to 1024`, …, `> 16384` tokens."""
    low = 0
    for edge in LENGTH_EDGES:
        if tokens <= edge:
            return f"{low + 1} to {edge}" if low else f"≤ {edge}"
        low = edge
    return f"> {low}"


def _group(
    kind: str,
    name: str,
    pairs: list[tuple[RequestOutcome, RequestOutcome]],
    slos: Mapping[str, Slo],
) -> Group:
    group = Group(kind, name, len(pairs), 0, 0, 0, 0, None, None)
    e2e, ttft = [], []
    for before, after in pairs:
        change = _change(before, after)
        group.gained += change > 0
        group.lost += change < 0
        slo = slos.get(before.slo_class, Slo())
        met_before, met_after = before.meets(slo), after.meets(slo)
        group.slo_gained += met_after and not met_before
        group.slo_lost += met_before and not met_after
        if before.is_answered and after.is_answered:
            e2e.append(after.e2e_s / before.e2e_s)
            if before.ttft_s and after.ttft_s:
                ttft.append(after.ttft_s / before.ttft_s)
    group.e2e_ratio_p50 = median(e2e) if e2e else None
    group.ttft_ratio_p50 = median(ttft) if ttft else None
    return group


def _change(before: RequestOutcome, after: RequestOutcome) -> int:
    """1 gained, -1 lost, 0 the same. An answer instead of none is a gain."""
    if before.is_answered != after.is_answered:
        return 1 if after.is_answered else -1
    gap_s = before.e2e_s - after.e2e_s
    if not before.is_answered or abs(gap_s) <= max(SAME_S, SAME_FRAC * before.e2e_s):
        return 0
    return 1 if gap_s > 0 else -1
