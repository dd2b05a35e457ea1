"""A comparison as a value, and its JSON form (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from penstock import __version__
from penstock.core.metrics import Slo
from penstock.twin.compare.run import Contender, Run, focus_rate
from penstock.workloads.report import CDF_FRACTIONS

SCHEMA = "penstock-compare"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything `compare` found. Runs are by rate, then in the order of the stacks."""

    title: str
    stacks: list[Contender]
    runs: list[Run]
    slos: dict[str, Slo]
    configuration: dict[str, Any]
    notes: list[str]

    @property
    def rates(self) -> list[float]:
        return sorted({run.rate for run in self.runs})

    @property
    def compared(self) -> list[str]:
        """Names of the stacks that ran."""
        return list(dict.fromkeys(run.stack for run in self.runs))

    @property
    def focus(self) -> float:
        """The rate that the pictures over time are of."""
        return focus_rate(self.runs)

    def of_stack(self, name: str) -> list[Run]:
        """Its runs, by rate."""
        return [run for run in self.runs if run.stack == name]

    def at_focus(self) -> list[Run]:
        return [run for run in self.runs if run.rate == self.focus]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "penstock_version": __version__,
            "title": self.title,
            "focus_rate": self.focus,
            "stacks": [_stack_json(stack) for stack in self.stacks],
            "slos": {name: asdict(slo) for name, slo in self.slos.items()},
            "runs": [_run_json(run) for run in self.runs],
            "cdf_fractions": list(CDF_FRACTIONS),
            "configuration": self.configuration,
            "notes": self.notes,
        }


def notes_of(stacks: Sequence[Contender], runs: Sequence[Run]) -> list[str]:
    """What the runs themselves ask to be said."""
    notes = [f"stack `{stack.name}`: {target}" for stack in stacks for target in stack.infeasible]
    beyond = sum(run.steps_out_of_range > 0 for run in runs)
    if beyond:
        notes.append(f"{beyond} of {len(runs)} runs had steps beyond what the profile was calibrated on")
    return notes


def _stack_json(stack: Contender) -> dict[str, Any]:
    return {
        "name": stack.name,
        "policies": stack.settings.policies.names(),
        "limits": asdict(stack.limits),
        "infeasible": [asdict(target) for target in stack.infeasible],
    }


def _run_json(run: Run) -> dict[str, Any]:
    body = asdict(run)
    body["goodput"] |= {
        "goodput_rps": run.goodput.goodput_rps,
        "attained_frac": run.goodput.attained_frac,
    }
    for tenant, service in zip(body["fairness"]["largest"], run.fairness.largest, strict=True):
        tenant["served_frac"] = service.served_frac
    return body
