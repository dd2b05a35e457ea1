"""Who runs, who waits and what was served, by tenant, under a bounded set of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from penstock.core.request import Request

LABELS_MAX: Final = 64
OTHER: Final = "other"
PROMPT, OUTPUT = "prompt", "output"
OUTPUT_WEIGHT: Final = 2.0  # of the gap: an output token is worth two of a prompt, as in `vtc`


class TenantBook:
    """Counts by events. Tenants of the settings have labels of their own; so have the first others to come,
    up to `LABELS_MAX` in all; the rest share `other`."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._labels = {name: name for name in list(weights)[:LABELS_MAX]}
        self._places: dict[str, tuple[str, bool]] = {}  # request id → label, runs; of what is inside
        self.running: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.served: Counter[tuple[str, str]] = Counter()  # (label, prompt or output) → tokens
        self._credit: dict[str, float] = {}  # of the gap: what a label was lifted by

    def entered(self, requests: Iterable[Request]) -> None:
        """They wait, at the desk."""
        for request in requests:
            label = self._label(request.tenant)
            if not self.waiting[label]:
                self._lift(label)
            self.waiting[label] += 1
            self._places[request.id] = (label, False)

    def started(self, request: Request, *, resumed: bool) -> None:
        """It got a slot. Its prompt counts as served the first time."""
        label = self._move(request.id, runs=True)
        if label is not None and not resumed:
            self.served[label, PROMPT] += request.prompt_len

    def preempted(self, request_id: str) -> None:
        self._move(request_id, runs=False)

    def token(self, request_id: str) -> None:
        """One more output token."""
        if (place := self._places.get(request_id)) is not None:
            self.served[place[0], OUTPUT] += 1

    def left(self, request_id: str) -> None:
        """It ended, however."""
        if (place := self._places.pop(request_id, None)) is not None:
            (self.running if place[1] else self.waiting)[place[0]] -= 1

    @property
    def labels(self) -> list[str]:
        """Those that were ever used."""
        return sorted({*self.running, *self.waiting})

    def gap_tokens(self) -> float:
        """The largest difference of service between labels that all have requests waiting.

        Weighted tokens over the tenant's weight; a label that had nothing waiting starts with the least of
        the others, so that idling counts for nothing.
        """
        services = [self._service(label) for label, count in self.waiting.items() if count > 0]
        return max(services) - min(services) if services else 0.0

    def _label(self, tenant: str) -> str:
        label = self._labels.get(tenant)
        if label is None and len(self._labels) < LABELS_MAX:
            label = self._labels[tenant] = tenant
        return OTHER if label is None else label

    def _move(self, request_id: str, *, runs: bool) -> str | None:
        place = self._places.get(request_id)
        if place is None or place[1] == runs:
            return None
        label = place[0]
        self._places[request_id] = (label, runs)
        change = 1 if runs else -1
        self.running[label] += change
        self.waiting[label] -= change
        return label

    def _service(self, label: str) -> float:
        tokens = self.served[label, PROMPT] + OUTPUT_WEIGHT * self.served[label, OUTPUT]
        return tokens / self._weights.get(label, 1.0) + self._credit.get(label, 0.0)

    def _lift(self, label: str) -> None:
        waiting = [self._service(other) for other, count in self.waiting.items() if count > 0]
        below = min(waiting, default=0.0) - self._service(label)
        if below > 0.0:
            self._credit[label] = self._credit.get(label, 0.0) + below
