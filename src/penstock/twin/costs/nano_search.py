"""The two stages of NanoFlow's pipeline search, over any graph of nano-operations.

Stage 1 leaves interference out and picks the structure (which graph, which order). Stage 2 keeps the
structure and picks each operation's share of the device. The published search solves mixed-integer programs
for minutes; this one descends from several starts in a second, and is compared with brute force on small
graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from penstock.twin.costs.nano_schedule import COMPUTE, WHOLE

SWEEPS_MAX: Final = 4
# Tenths of memory and network kernels to start from; what runs beside them gets the rest, what is alone all.
STARTS: Final = ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2), (5, 3), (WHOLE, WHOLE))
STARTS_FOLLOWED: Final = 3
PAIR_TENTHS: Final = (1, 2, 3, 4, 5)


def best_order(
    order: Sequence[int], after: Sequence[Sequence[int]], cost_of: Callable[[Sequence[int]], float]
) -> list[int]:
    """Stage 1: single operations to other places, for as long as it helps. `after[i]` stays before i."""
    order, cost = list(order), cost_of(order)
    for _ in range(SWEEPS_MAX):
        before = cost
        for operation in list(order):
            for moved in _elsewhere(order, operation, after):
                if (moved_cost := cost_of(moved)) < cost:
                    order, cost = moved, moved_cost
        if cost >= before:
            break
    return order


def _elsewhere(order: Sequence[int], operation: int, after: Sequence[Sequence[int]]) -> list[list[int]]:
    """The orders with `operation` in another place between what it needs and what needs it."""
    rest = [each for each in order if each != operation]
    low = max((rest.index(each) + 1 for each in after[operation]), default=0)
    high = min((place for place, each in enumerate(rest) if operation in after[each]), default=len(rest))
    places = (place for place in range(low, high + 1) if place != order.index(operation))
    return [[*rest[:place], operation, *rest[place:]] for place in places]


def best_shares(
    kinds: Sequence[int], beside: Sequence[tuple[int, int]], cost_of: Callable[[Sequence[int]], float]
) -> tuple[tuple[int, ...], float]:
    """Stage 2: descent over tenths from the best of `STARTS`. And what they cost. Deterministic.

    `beside` pairs operations that ran side by side while nobody disturbed. Where one operation is to start
    beside another, both shares must change at once, so the descent moves pairs as well.
    """
    starts = [_start(kinds, beside, memory, network) for memory, network in STARTS]
    starts.sort(key=cost_of)
    found = [_descend(tenths, kinds, cost_of) for tenths in starts[:STARTS_FOLLOWED]]
    tenths, cost = min(found, key=lambda each: each[1])
    return tuple(tenths), cost


def side_by_side(spans: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Pairs of operations that overlap in time."""
    found = []
    for first, (begin, end) in enumerate(spans):
        for second in range(first + 1, len(spans)):
            if max(begin, spans[second][0]) < min(end, spans[second][1]):
                found.append((first, second))
    return found


def _start(kinds: Sequence[int], beside: Sequence[tuple[int, int]], memory: int, network: int) -> list[int]:
    """Network and memory kernels that have company get their tenths, and compute beside them what is left."""
    wanted = (0, memory, network)
    company: list[set[int]] = [set() for _ in kinds]
    for one, other in beside:
        company[one].add(kinds[other])
        company[other].add(kinds[one])
    tenths = []
    for kind, met in zip(kinds, company, strict=True):
        left = WHOLE - sum(wanted[other] for other in met if other != kind)
        tenths.append(max(1, left) if kind == COMPUTE or not met else wanted[kind])
    return tenths


def _descend(
    tenths: list[int], kinds: Sequence[int], cost_of: Callable[[Sequence[int]], float]
) -> tuple[list[int], float]:
    cost = cost_of(tenths)
    for _ in range(SWEEPS_MAX):
        before = cost
        for changes in _moves(kinds):
            if all(tenths[index] == share for index, share in changes):
                continue
            tried = list(tenths)
            for index, share in changes:
                tried[index] = share
            if (tried_cost := cost_of(tried)) < cost:
                tenths, cost = tried, tried_cost
        if cost >= before * (1.0 - 1e-4):
            break
    return tenths, cost


def _moves(kinds: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """One operation to any share; then a product and a kernel of another kind to shares that fit together."""
    for index in range(len(kinds)):
        for share in range(1, WHOLE + 1):
            yield ((index, share),)
    products = [index for index, kind in enumerate(kinds) if kind == COMPUTE]
    for other in (index for index, kind in enumerate(kinds) if kind != COMPUTE):
        for product in products:
            for share in PAIR_TENTHS:
                yield ((product, WHOLE - share), (other, share))
