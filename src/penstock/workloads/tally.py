"""The running totals of a replay: what its progress shows, in constant memory."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from penstock.core.metrics import RequestOutcome, Slo

RECENT = 500  # requests that the current percentiles are over
RATE_WINDOW_S = 5.0


@dataclass(slots=True)
class Tally:
    """Counts since the start, and the latest TTFTs."""

    slo: Slo
    sent: int = 0
    in_flight: int = 0
    in_flight_max: int = 0
    answered: int = 0
    attained: int = 0
    outputs: int = 0  # chunks of output received
    errors: Counter[str] = field(default_factory=Counter)
    _ttft_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    @property
    def failed(self) -> int:
        return self.errors.total()

    def started(self) -> None:
        self.sent += 1
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)

    def ended(self, outcome: RequestOutcome) -> None:
        self.in_flight -= 1
        if outcome.is_answered:
            self.answered += 1
            self.attained += outcome.meets(self.slo)
        else:
            self.errors[outcome.error_code or outcome.finish] += 1
        if outcome.ttft_s is not None:
            self._ttft_s.append(outcome.ttft_s)

    def ttft_ms(self, fraction: float) -> float | None:
        """A percentile over the latest requests that have a first token."""
        if not self._ttft_s:
            return None
        ordered = sorted(self._ttft_s)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] * 1e3

    def output_rate(self, now_s: float) -> float:
        """Pieces of output a second over the last five seconds of calls. Changes the remembered marks."""
        self._marks.append((now_s, self.outputs))
        while len(self._marks) > 2 and self._marks[0][0] < now_s - RATE_WINDOW_S:
            self._marks.popleft()
        since_s, before = self._marks[0]
        return (self.outputs - before) / (now_s - since_s) if now_s > since_s else 0.0
