"""How fast the line moves, measured only while there is a line. Pure."""

from __future__ import annotations

from collections import deque

SAMPLES_MAX = 64
SAMPLES_MIN = 8


class DrainRate:
    """Mean time between finishes of saturated work, over the last `SAMPLES_MAX` of them.

    A finish with nobody waiting says how fast requests arrive, not how fast they could be served, so only the
    gap between two finishes that both left somebody waiting counts.
    """

    def __init__(self) -> None:
        self._gaps_s: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._last_saturated_s: float | None = None

    def finished(self, now_s: float, *, saturated: bool) -> None:
        """One request left the engine; `saturated` when others were waiting for its place."""
        if saturated and self._last_saturated_s is not None:
            self._gaps_s.append(max(0.0, now_s - self._last_saturated_s))
        self._last_saturated_s = now_s if saturated else None

    @property
    def gap_s(self) -> float | None:
        """Seconds a finish takes on average; None until enough was seen. O(SAMPLES_MAX), called on entry."""
        if len(self._gaps_s) < SAMPLES_MIN:
            return None
        return sum(self._gaps_s) / len(self._gaps_s)
