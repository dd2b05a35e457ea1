"""How many threads a step uses, and how they wait for each other.

A step is hundreds of short parallel regions. Two facts of this kind of machine (docs/engine.md):

- A thread that spins at the end of a region while its partner is scheduled away burns the very core that the
  partner waits for; beside one busy neighbour throughput falls twentyfold. So idle threads sleep at once.
- Waking a sleeper costs some microseconds a region, more than a second thread saves while a step is bound
  by reading weights. So steps of few rows run on one thread.
"""

from __future__ import annotations

import os
from typing import Final

FEW_ROWS: Final = 12  # measured with benchmarks/threads.py: from here on the second thread pays

_WAIT_SETTINGS: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_asleep() -> None:
    """Make OpenMP threads sleep instead of spin. Call before torch is loaded; a user's own setting wins."""
    if not any(name in os.environ for name in _WAIT_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = "0"


class Threads:
    """The thread count of each step; a step's result does not depend on it (measured at load)."""

    def __init__(self, most: int) -> None:
        self.most = most

    def count_for(self, rows: int) -> int:
        return 1 if rows < FEW_ROWS else self.most

    def use_for(self, rows: int) -> int:
        """Set torch's threads for a step of so many rows; returns their number."""
        import torch

        count = self.count_for(rows)
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        return count
