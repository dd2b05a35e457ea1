"""A stack names one policy a slot; a preset is a named stack in a file of a few lines."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from dataclasses import asdict, dataclass, fields
from importlib import resources
from types import ModuleType
from typing import Any

from penstock.core.errors import ConfigError
from penstock.core.settings import PolicySettings
from penstock.policies import admit, compose, preempt, rank, retain
from penstock.policies.admit import ADMIT, Admit
from penstock.policies.compose import COMPOSE, Compose
from penstock.policies.preempt import PREEMPT, Preempt
from penstock.policies.rank import RANK, Rank
from penstock.policies.registry import Registry, nearest
from penstock.policies.retain import RETAIN, Retain

_SLOT_PACKAGES: tuple[ModuleType, ...] = (rank, admit, compose, preempt, retain)


def _import_policies() -> None:
    """Importing a slot's files registers its policies; adding a policy is adding a file."""
    for package in _SLOT_PACKAGES:
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


_import_policies()

REGISTRIES: dict[str, Registry[Any]] = {
    "rank": RANK,
    "admit": ADMIT,
    "compose": COMPOSE,
    "preempt": PREEMPT,
    "retain": RETAIN,
}


@dataclass(frozen=True, slots=True)
class Stack:
    """Fresh policies of one replica; they keep private state, so a stack is never shared."""

    rank: Rank
    admit: Admit
    compose: Compose
    preempt: Preempt
    retain: Retain


def make_stack(policies: PolicySettings) -> Stack:
    """Raises ConfigError naming the slot and the nearest policies."""
    return Stack(**{slot: REGISTRIES[slot].make(name) for slot, name in asdict(policies).items()})


def preset_names() -> list[str]:
    folder = resources.files("penstock") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """The preset's TOML: `summary`, `source`, `[policies]`, and perhaps `[replica]`. Raises ConfigError."""
    known = preset_names()
    if name not in known:
        raise ConfigError(f"`{name}` is not a preset", hint=nearest(name, known), param="preset")
    text = (resources.files("penstock") / "presets" / f"{name}.toml").read_text()
    return tomllib.loads(text)


assert set(REGISTRIES) == {item.name for item in fields(PolicySettings)} == {f.name for f in fields(Stack)}
