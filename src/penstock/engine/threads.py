"""How many threads a step uses, and how they wait for each other.

A step is hundreds of short parallel regions, a fraction of a millisecond apart. Between two of them an idle
thread spins for some microseconds and then sleeps. Both ends of that scale were measured (docs/engine.md):

- A thread that sleeps before the next region begins must be woken for it. Waking takes longer than the
  region, so that its partner falls asleep meanwhile, and so on: the whole step takes twice as long. The spin
  must outlast a wake-up.
- A thread that spins on while its partner is scheduled away burns the very core that the partner waits for;
  beside one busy neighbour a step then takes many times as long.

A step of one row is bound by reading weights. It runs on one thread, and leaves a core to the gateway.
"""

from __future__ import annotations

import os
from typing import Final

FEW_ROWS: Final = 2  # measured with benchmarks/threads.py and behind the gateway (docs/engine.md)
SPIN_COUNT: Final = 3000  # turns of libgomp's waiting loop, some 30 µs; benchmarks/threads.py --spins

_WAIT_SETTINGS: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_briefly() -> None:
    """Make idle OpenMP threads sleep soon. Call before torch is loaded; a user's own setting wins."""
    if not any(name in os.environ for name in _WAIT_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


class Threads:
    """The thread count of each step; a step's result does not depend on it (measured at load)."""

    def __init__(self, most: int, *, are_shared: bool = False) -> None:
        """`are_shared`: steps of two lanes share the cores out, and may have any number of them."""
        self.most = most
        self._are_shared = are_shared

    def count_for(self, rows: int, most: int | None = None) -> int:
        """Of a step of so many rows that may have `most` of them (None: all)."""
        return 1 if rows < FEW_ROWS else (most or self.most)

    def counts_for(self, rows: int) -> range:
        """All that a step of so many rows may ever have."""
        count = self.count_for(rows)
        return range(1 if self._are_shared else count, count + 1)

    def use(self, count: int) -> None:
        """Set torch's threads for steps that the calling thread computes."""
        import torch

        if torch.get_num_threads() != count:  # asked first: a new thread's first answer is a default
            torch.set_num_threads(count)
