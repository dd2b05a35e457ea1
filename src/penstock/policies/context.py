"""What the policies of one replica share: the operator's terms, estimators, random streams."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from penstock.core.metrics import Slo
from penstock.core.phase_profile import PhaseProfile

Shared = TypeVar("Shared")


class _FromContext(Protocol):
    def __call__(self, context: Context, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class ServiceTerms:
    """What the operator promised: latency targets by class, weights by tenant. `seed` feeds the streams.

    `phase_profile` is of the device, where somebody has swept it.
    """

    slos: Mapping[str, Slo] = field(default_factory=dict)
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    phase_profile: PhaseProfile | None = None

    def weight(self, tenant: str) -> float:
        return self.tenant_weights.get(tenant, 1.0)


class Context:
    """Made once a stack. Estimators are made when the first policy asks, and observe what policies do."""

    def __init__(self, terms: ServiceTerms | None = None) -> None:
        self.terms = terms or ServiceTerms()
        self._shared: dict[type[Any], Any] = {}

    def shared(self, kind: type[Shared]) -> Shared:
        """The stack's one estimator of this kind, `kind(context)`."""
        if kind not in self._shared:
            self._shared[kind] = cast(_FromContext, kind)(self)
        return cast(Shared, self._shared[kind])

    @property
    def estimators(self) -> list[Any]:
        """All that were asked for, in order."""
        return list(self._shared.values())

    def random(self, stream: str, number: int = 0) -> np.random.Generator:
        """A named stream: the same for the same seed, name and number, in the engine as in the twin."""
        digest = hashlib.blake2b(f"{self.terms.seed}/{stream}/{number}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "big"))
