"""How long programs stay away between two turns, by the tool that they call: an empirical distribution."""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from penstock.policies.base import Observer
from penstock.policies.context import Context
from penstock.policies.estimate.programs import Programs
from penstock.policies.view import SequenceView

SAMPLES_MIN: Final = 10  # of one tool, before its own distribution counts (card continuum)
SAMPLES_MAX: Final = 512  # newest gaps kept for one tool
POOLED_MAX: Final = 2048  # newest gaps kept over all tools
TOOLS_MAX: Final = 256  # tools told apart; the one called longest ago is forgotten


class GapSamples:
    """The newest `size` gaps in seconds, in order of size as well. A new one costs O(size) memory moves."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_age: deque[float] = deque()
        self._sorted: list[float] = []
        self._sums: list[float] | None = None  # over the sorted gaps; None after a change

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, gap_s: float) -> None:
        if len(self._by_age) == self._size:
            oldest = self._by_age.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
        self._by_age.append(gap_s)
        bisect.insort(self._sorted, gap_s)
        self._sums = None

    @property
    def mean_s(self) -> float:
        """There is a gap."""
        return self._prefix_sums()[-1] / len(self._sorted)

    def outcomes(self) -> Iterator[tuple[float, float, float]]:
        """For each gap τ, by size: τ, the share of gaps within τ, and the mean of min(gap, τ). O(gaps)."""
        count = len(self._sorted)
        sums = self._prefix_sums()
        for index, gap_s in enumerate(self._sorted):
            if index + 1 < count and self._sorted[index + 1] == gap_s:
                continue  # equals are one step of the distribution
            within = index + 1
            yield gap_s, within / count, (sums[index] + (count - within) * gap_s) / count

    def _prefix_sums(self) -> list[float]:
        if self._sums is None:
            self._sums = list(accumulate(self._sorted))
        return self._sums


class GapBelief(Observer):
    """Observed gaps: return of a program less the end of its turn before, filed under the tool called.

    Only programs that return are seen. Bounded by the constants above.
    """

    def __init__(self, context: Context) -> None:
        self._programs = context.shared(Programs)
        self._by_tool: OrderedDict[str, GapSamples] = OrderedDict()
        self._pooled = GapSamples(POOLED_MAX)

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        program = self._programs.of(sequence)
        if program is None or program.gap_s is None:
            return
        self._pooled.add(program.gap_s)
        if program.tool is None:
            return
        samples = self._by_tool.setdefault(program.tool, GapSamples(SAMPLES_MAX))
        self._by_tool.move_to_end(program.tool)
        samples.add(program.gap_s)
        if len(self._by_tool) > TOOLS_MAX:
            self._by_tool.popitem(last=False)

    def of(self, tool: str | None) -> GapSamples | None:
        """The tool's own gaps; with fewer than SAMPLES_MIN the gaps of all tools; None: too few of these."""
        own = None if tool is None else self._by_tool.get(tool)
        if own is not None and len(own) >= SAMPLES_MIN:
            return own
        return self._pooled if len(self._pooled) >= SAMPLES_MIN else None

    def own(self, tool: str | None) -> GapSamples | None:
        """The tool's own gaps, however few; None where it has none."""
        return None if tool is None else self._by_tool.get(tool)
