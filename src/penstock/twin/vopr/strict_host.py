"""Host memory without a model, strict about copies: what is read must not change until the copy is done, and
what is written holds nothing until then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.step import Copy, CopyDone, Direction, StepPlan
from penstock.twin.vopr.failure import require

Pages = dict[int, list[int]]  # block → what its slots hold


@dataclass(slots=True)
class _Flight:
    copy: Copy
    due_step: int
    is_good: bool
    read: dict[int, list[int]] = field(default_factory=dict)  # device block → what it held at the start


class StrictHost:
    """Makes the copies of plans on the executor's pages. Deterministic: a copy takes one to three steps.

    `failures_due`: so many of the next copies beside the steps fail.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._host: Pages = {}
        self._flights: list[_Flight] = []
        self._step = 0
        self.failures_due = 0

    def begin(self, plan: StepPlan) -> list[CopyDone]:
        """Begin the plan's copies, and finish those it waits for."""
        self._step += 1
        for copy in plan.copies:
            is_beside = copy.copy_id not in plan.waits
            fails = is_beside and self.failures_due > 0
            self.failures_due -= fails
            self._flights.append(_Flight(copy, self._step + copy.copy_id % 3, not fails))
        done: list[CopyDone] = []
        for copy_id in plan.waits:
            known = any(flight.copy.copy_id == copy_id for flight in self._flights)
            finished = any(each.copy_id == copy_id for each in done)
            require(known or finished, "plan", f"it waits for copy {copy_id}, which is not under way")
            while any(flight.copy.copy_id == copy_id for flight in self._flights):
                done.append(self._finish())
        self._guard()
        return done

    def _guard(self) -> None:
        """What is under way when the step computes: its targets hold nothing, its sources stay."""
        written: set[int] = set()  # by copies that come before
        for flight in self._flights:
            for block, _ in _pairs(flight.copy):
                if flight.copy.direction is Direction.IN:
                    self._pages.pop(block, None)
                    written.add(block)
                elif block not in written:
                    flight.read.setdefault(block, list(self._pages.get(block, [])))

    def end(self) -> list[CopyDone]:
        """The step is over: what is due is done, in order."""
        done = []
        while self._flights and self._flights[0].due_step <= self._step:
            done.append(self._finish())
        return done

    def _finish(self) -> CopyDone:
        flight = self._flights.pop(0)
        copy, is_out = flight.copy, flight.copy.direction is Direction.OUT
        held, written = (self._pages, self._host) if is_out else (self._host, self._pages)
        for block, before in flight.read.items():
            is_same = self._pages.get(block, []) == before
            require(is_same, "kv-guard", f"block {block} was written while {copy} read it")
        for device, host in _pairs(copy):
            source, target = (device, host) if is_out else (host, device)
            if flight.is_good:
                written[target] = list(held.get(source, []))
            else:
                written.pop(target, None)
        return CopyDone(copy.copy_id, 1e-4 * copy.block_count, flight.is_good)


def _pairs(copy: Copy) -> list[tuple[int, int]]:
    """(device block, host block) of all that moves."""
    return [(device + i, host + i) for device, host, count in copy.extents for i in range(count)]
