"""Output lengths: what finished requests tell about those that run."""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.view import SequenceView

WINDOW: Final = 200  # finished outputs a history holds (LightLLM, req_queue.py)
OWN_FROM: Final = 50  # finished outputs from which a group is believed on its own
GROUPS_MAX: Final = 128  # groups remembered; whoever was seen longest ago goes back to the pool
POOLED: Final = 0  # the group of all
_STRIDE: Final = 1 << 32  # between the values of two groups in the sorted table
_UNKNOWN: Final = _STRIDE - 1  # longer than any output: capped by each request's own maximum

Key = tuple[str, str]  # tenant, SLO class
Ints = NDArray[np.int64]


class LengthBelief(Observer):
    """The distribution of a request's total output, given what it has produced: the empirical one.

    A ring of the last `WINDOW` outputs for each (tenant, SLO class); below `OWN_FROM` of them the pooled
    ring answers. The pool starts half full of outputs that are as long as allowed, so that a cold start
    reserves too much rather than too little: the first to finish are the short ones. A group that begins
    while the pool holds such values begins with as many. Answers are whole tokens above the
    output so far and at most `max_output_tokens`.

    A request with g > 0 tokens draws from the values above g, linearly interpolated: the support is
    g, the sorted values > g, and its maximum m where that is larger; a draw is the point at a uniform place
    between the first and the last. A request without output draws one of the values. Outputs that were cut
    off by a client say little and are left out.

    Source: past-future scheduler (ASPLOS 2025), conditional sampling. One query costs O(log WINDOW), a
    finish O(WINDOW).
    """

    def __init__(self, context: Context) -> None:
        self._histories = [_History(WINDOW // 2)]  # by group
        self._groups: OrderedDict[Key, int] = OrderedDict()  # least recently fed first
        self._table = np.full((GROUPS_MAX + 1, WINDOW), _UNKNOWN, np.int64)
        self._table += _STRIDE * np.arange(GROUPS_MAX + 1)[:, None]
        self._counts = np.zeros(GROUPS_MAX + 1, np.int64)
        self._stale = {POOLED}  # groups whose row of the table is not up to date
        self.version = 0  # moves with every finish that it learned from
        self.grouping = 0  # moves when a request may belong to another group than before

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        if reason is FinishReason.STOP or reason is FinishReason.LENGTH:
            self.learn(sequence.request, sequence.output_len)

    def learn(self, request: Request, output_tokens: int) -> None:
        """One more finished output."""
        own = self._own_group((request.tenant, request.slo_class))
        output_tokens = max(1, output_tokens)
        for group in (POOLED, own):
            self._histories[group].append(output_tokens)
            self._stale.add(group)
        self.grouping += self._histories[own].finished == OWN_FROM
        self.version += 1

    # ---- one request ----------------------------------------------------------------------------------

    def at(self, sequence: SequenceView, places: Iterable[float]) -> list[int]:
        """Total outputs at places from 0 to 1 of its distribution; at uniform places they are draws."""
        values, produced, maximum = self._of(sequence)
        if produced == 0:
            last = len(values) - 1
            return [max(1, min(values[min(int(place * len(values)), last)], maximum)) for place in places]
        first = bisect.bisect_right(values, produced)
        steps = len(values) - first + (values[-1] < maximum)
        return [_interpolated(values, first, place * steps, steps, produced, maximum) for place in places]

    def mean(self, sequence: SequenceView) -> float:
        """Expected total output tokens."""
        values, produced, maximum = self._of(sequence)
        first = bisect.bisect_right(values, produced) if produced else 0
        capped = bisect.bisect_left(values, maximum, first)
        total = float(sum(values[first:capped])) + maximum * (len(values) - capped)
        if produced == 0:
            return max(1.0, total / len(values))
        if capped == len(values):  # the maximum itself ends the support
            total += maximum
        # The mean of a line through the support: both ends count half.
        steps = len(values) - first + (values[-1] < maximum)
        return (total + produced - (produced + maximum) / 2) / steps

    # ---- many requests at once ------------------------------------------------------------------------

    def group_of(self, request: Request) -> int:
        """Whose history answers for it. Ask again when `grouping` has moved."""
        group = self._groups.get((request.tenant, request.slo_class))
        return POOLED if group is None or self._histories[group].finished < OWN_FROM else group

    def totals(self, groups: Ints, produced: Ints, maxima: Ints, uniform: NDArray[np.float64]) -> Ints:
        """Total outputs int64[k, n] of n requests at uniform places float64[k, n] in [0, 1)."""
        self._refresh()
        table, base = self._table.ravel(), groups * _STRIDE
        begins, counts = groups * WINDOW, self._counts[groups]
        first = np.searchsorted(table, base + produced, side="right") - begins
        first[produced == 0] = 0
        last = np.minimum(table[begins + counts - 1] - base, maxima)
        # Place 0 is what it has, place j the (first + j - 1)-th value; behind them all is the maximum.
        exact = uniform * (counts - first + (last < maxima))
        index = exact.astype(np.int64)
        low = _values_at(table, begins, base, first + index - 1, counts, maxima)
        low = np.where(index == 0, produced, low)
        high = _values_at(table, begins, base, first + index, counts, maxima)
        drawn = np.ceil(low + (high - low) * (exact - index)).astype(np.int64)
        is_new = produced == 0
        if is_new.any():
            one = _values_at(table, begins, base, (uniform * counts).astype(np.int64), counts, maxima)
            drawn = np.where(is_new, one, drawn)
        result: Ints = np.minimum(np.maximum(drawn, produced + 1), maxima)
        return result

    # ---- inside ---------------------------------------------------------------------------------------

    def _of(self, sequence: SequenceView) -> tuple[list[int], int, int]:
        request = sequence.request
        return self._histories[self.group_of(request)].values, sequence.output_len, request.max_output_tokens

    def _own_group(self, key: Key) -> int:
        """Its group, made or taken from whoever was fed longest ago."""
        group = self._groups.get(key)
        if group is not None:
            self._groups.move_to_end(key)
            return group
        fresh = _History(self._histories[POOLED].values.count(_UNKNOWN))
        if len(self._groups) < GROUPS_MAX:
            group = len(self._histories)
            self._histories.append(fresh)
        else:
            _, group = self._groups.popitem(last=False)
            self._histories[group] = fresh
            self.grouping += 1
        self._groups[key] = group
        return group

    def _refresh(self) -> None:
        for group in self._stale:
            values = self._histories[group].values
            self._counts[group] = len(values)
            row = self._table[group]
            row[: len(values)] = values
            row[len(values) :] = _UNKNOWN
            row += group * _STRIDE
        self._stale.clear()


class _History:
    """The last `WINDOW` values, in order of coming and sorted; some may be unknown at first."""

    def __init__(self, unknown: int) -> None:
        self.ring = deque([_UNKNOWN] * unknown)
        self.values = [_UNKNOWN] * unknown
        self.finished = 0

    def append(self, value: int) -> None:
        self.finished += 1
        if len(self.ring) == WINDOW:
            oldest = self.ring.popleft()
            del self.values[bisect.bisect_left(self.values, oldest)]
        self.ring.append(value)
        bisect.insort(self.values, value)


def _interpolated(
    values: list[int], first: int, place: float, steps: int, produced: int, maximum: int
) -> int:
    """The point of the support at `place` in 0..steps, rounded up."""
    index = min(int(place), steps - 1)
    above = first + index
    low = produced if index == 0 else min(values[above - 1], maximum)
    high = min(values[above], maximum) if above < len(values) else maximum
    exact = low + (high - low) * (place - index)
    return min(max(math.ceil(exact), produced + 1), maximum)


def _values_at(table: Ints, begins: Ints, base: Ints, places: Any, counts: Ints, maxima: Ints) -> Ints:
    """The value at each place of its group's row, at most the maximum, which also stands behind the last."""
    inside = np.clip(places, 0, counts - 1)
    found: Ints = np.where(places < counts, np.minimum(table[begins + inside] - base, maxima), maxima)
    return found
