"""A stack names one policy a slot; a preset is a named stack in a file of a few lines."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from types import ModuleType
from typing import Any

from penstock.core.errors import ConfigError
from penstock.core.settings import PolicySettings, Settings
from penstock.policies import admit, compose, lanes, preempt, rank, retain
from penstock.policies.admit import ADMIT, Admit
from penstock.policies.base import HOOKS, Observer
from penstock.policies.compose import COMPOSE, Compose
from penstock.policies.context import Context, ServiceTerms
from penstock.policies.lanes import LANES, Lanes
from penstock.policies.preempt import PREEMPT, Preempt
from penstock.policies.rank import RANK, Rank
from penstock.policies.registry import Registry, nearest
from penstock.policies.retain import RETAIN, Retain

_SLOT_PACKAGES: tuple[ModuleType, ...] = (rank, admit, compose, preempt, retain, lanes)


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
    "lanes": LANES,
}


@dataclass(frozen=True, slots=True)
class Stack:
    """Fresh policies of one replica; they keep private state, so a stack is never shared.

    `hooks`: name of an observer's method → the bound methods of all policies and estimators that override it.
    """

    rank: Rank
    admit: Admit
    compose: Compose
    preempt: Preempt
    retain: Retain
    lanes: Lanes
    hooks: Mapping[str, Sequence[Callable[..., Any]]]


def make_stack(policies: PolicySettings, terms: ServiceTerms | None = None) -> Stack:
    """Raises ConfigError naming the slot and the nearest policies, a wrong option, or a conflict."""
    names = policies.names()
    _check_options(policies)
    if (conflict := conflict_in(names)) is not None:
        slot, other, why = conflict
        raise ConfigError(
            f"`{slot} = {names[slot]}` and `{other} = {names[other]}` cannot stand together: {why}.",
            hint=f"Choose another policy for `{slot}` or `{other}`.",
            param=f"policies.{slot}",
        )
    context = Context(terms)
    parts = {
        slot: REGISTRIES[slot].make(name, context, _own_table(slot, name, policies))
        for slot, name in names.items()
    }
    return Stack(**parts, hooks=_hooks([*context.estimators, *parts.values()]))


def make_stack_of(settings: Settings) -> Stack:
    """The stack of a replica that runs on these settings. Raises as `make_stack`."""
    return make_stack(settings.policies, terms_of(settings))


def check_servable(settings: Settings) -> None:
    """Raises ConfigError for what an engine with two lanes cannot do beside them."""
    if not lanes_split(settings.policies):
        return
    alone = "it is about steps that have the machine to themselves"
    copies = settings.replica.host_kv_memory.strip() != "0"
    reasons = (
        ("replica.device", settings.replica.device == "cuda", "lanes share CPU cores, not a GPU", "cpu"),
        ("replica.host_kv_memory", copies, "no lane waits for copies", "0"),
        ("record.steps", bool(settings.record.steps), alone, ""),
        ("twin.profile", bool(settings.twin.profile), alone, ""),
    )
    for name, is_set, why, other in reasons:
        if is_set:
            instead = f"Set `{name}` to `{other}`" if other else f"Leave `{name}` out"
            raise ConfigError(
                f"`{name}` does not go with `lanes = {settings.policies.lanes}`: {why}.",
                hint=f"{instead}, or set `policies.lanes` to `none`.",
                param=name,
            )


def lanes_split(policies: PolicySettings) -> bool:
    """Whether prefill and decode run beside each other. Raises ConfigError for an unknown name."""
    return LANES.entry(policies.lanes).make.splits


def rank_class(name: str) -> type[Rank]:
    """What the desk and the gateway ask of a rank policy without making one. Raises ConfigError."""
    return RANK.entry(name).make


def rank_classes(policies: PolicySettings) -> frozenset[str]:
    """Classes of service that the rank policy's options name."""
    return rank_class(policies.rank).classes(_options("rank", policies.rank, policies))


def retain_class(name: str) -> type[Retain]:
    """What the gateway asks of a retain policy without making one. Raises ConfigError."""
    return RETAIN.entry(name).make


def terms_of(settings: Settings) -> ServiceTerms:
    """What the settings promise to classes and tenants."""
    return ServiceTerms(
        settings.slo, {name: tenant.weight for name, tenant in settings.tenants.items()}, settings.seed
    )


def _check_options(policies: PolicySettings) -> None:
    """Options of a policy that the stack leaves out may stand, but must be right."""
    for name in policies.options:
        slots = [slot for slot, registry in REGISTRIES.items() if name in registry.names()]
        if not slots:
            known = sorted({each for registry in REGISTRIES.values() for each in registry.names()})
            raise ConfigError(
                f"`policies.options.{name}` is for no known policy.",
                hint=nearest(name, known),
                param=f"policies.options.{name}",
            )
        for slot in slots:
            _options(slot, name, policies)


def _options(slot: str, name: str, policies: PolicySettings) -> Any:
    return REGISTRIES[slot].options(name, _own_table(slot, name, policies))


def _own_table(slot: str, name: str, policies: PolicySettings) -> dict[str, Any]:
    """Policies of one name in several slots share a table; each takes its own, and a typo stays with all."""
    others = {
        item.name
        for other, registry in REGISTRIES.items()
        if other != slot and name in registry.names()
        for item in fields(registry.entry(name).options)
    }
    own = {item.name for item in fields(REGISTRIES[slot].entry(name).options)}
    table = policies.options.get(name, {})
    return {key: value for key, value in table.items() if key in own or key not in others}


def conflict_in(names: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Two slots whose policies cannot stand in one stack, and why. Raises ConfigError for unknown names."""
    for slot, name in names.items():
        conflicts = REGISTRIES[slot].entry(name).conflicts
        for other_slot, other in names.items():
            if other in conflicts:
                return slot, other_slot, conflicts[other]
    return None


def _hooks(observers: Sequence[Observer]) -> dict[str, list[Callable[..., Any]]]:
    return {hook: [getattr(each, hook) for each in observers if _overrides(each, hook)] for hook in HOOKS}


def _overrides(observer: Observer, hook: str) -> bool:
    return getattr(type(observer), hook) is not getattr(Observer, hook)


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


assert list(REGISTRIES) == list(PolicySettings().names())
