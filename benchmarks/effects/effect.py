"""What an effect is: a scenario in which a policy wins, one in which it loses, and how to tell."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import benchmarks.effects
from penstock.workloads.charts import Chart


@dataclass(frozen=True, slots=True)
class Claim:
    """One inequality: `what` was `value` and had to be at least `low` and at most `high`."""

    what: str
    value: float
    low: float = float("-inf")
    high: float = float("inf")

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def bounds(self) -> str:
        low = [f"≥ {self.low:g}"] * (self.low > float("-inf"))
        high = [f"≤ {self.high:g}"] * (self.high < float("inf"))
        return ", ".join(low + high)

    def __str__(self) -> str:
        return f"{self.what}: {self.value:.4g} ({self.bounds}){'' if self.holds else '  FAILS'}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a scenario gave. `said` is one short cell of the table, numbers and units included."""

    said: str
    claims: Sequence[Claim]
    charts: Sequence[Chart] = ()

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)


@dataclass(frozen=True, slots=True)
class Effect:
    """A row of the table. `wins` and `loses` run in the twin, within seconds, and always give the same.

    `live` runs on this machine's CPU engine and may take a minute; None where the card says that it cannot
    be shown there, with the reason in `not_live`.
    """

    slot: str
    policy: str
    headline: str  # what the card claims, and whose numbers
    wins: Callable[[], Measured]
    loses: Callable[[], Measured]
    live: Callable[[], Measured] | None = None
    not_live: str = ""
    settings: dict[str, str] = field(default_factory=dict)  # the stack around it, where it needs one

    @property
    def name(self) -> str:
        return f"{self.slot}/{self.policy}"


def all_effects() -> list[Effect]:
    """Of every module of this package, sorted by name."""
    found: list[Effect] = []
    for module in pkgutil.iter_modules(benchmarks.effects.__path__):
        if not module.name.startswith("_"):
            found += getattr(importlib.import_module(f"benchmarks.effects.{module.name}"), "EFFECTS", ())
    return sorted(found, key=lambda effect: effect.name)
