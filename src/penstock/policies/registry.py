"""Named parts of one slot. Registering a name twice is a bug; asking for an unknown one is a user's typo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar, cast

from penstock.core.config import coerce_setting
from penstock.core.errors import ConfigError, did_you_mean
from penstock.policies.base import Policy
from penstock.policies.context import Context

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True)
class Entry(Generic[Part]):
    """One policy as `penstock policies` lists it."""

    name: str
    summary: str
    source: str
    make: type[Part]

    @property
    def options(self) -> type[Any]:
        """The dataclass of its settings."""
        return cast(type[Policy], self.make).Options

    @property
    def conflicts(self) -> Mapping[str, str]:
        """Policy of another slot → why the two cannot stand in one stack."""
        return cast(type[Policy], self.make).conflicts


class Registry(Generic[Part]):
    """The policies that may fill `slot`."""

    def __init__(self, slot: str) -> None:
        self.slot = slot
        self._entries: dict[str, Entry[Part]] = {}

    def register(self, name: str, *, source: str) -> Callable[[type[Part]], type[Part]]:
        """Class decorator. The class's first docstring line becomes its summary."""

        def add(policy: type[Part]) -> type[Part]:
            if name in self._entries:
                raise ValueError(f"policy `{name}` is already registered in slot `{self.slot}`")
            summary = (policy.__doc__ or "").strip().split("\n", 1)[0]
            assert summary, f"policy `{name}` needs a docstring"
            self._entries[name] = Entry(name, summary, source, policy)
            return policy

        return add

    def make(
        self, name: str, context: Context | None = None, options: Mapping[str, Any] | None = None
    ) -> Part:
        """A fresh policy. Raises ConfigError with the nearest names, and for options that are wrong."""
        policy = cast(type[Any], self.entry(name).make)
        return cast(Part, policy(context or Context(), self.options(name, options or {})))

    def options(self, name: str, given: Mapping[str, Any]) -> Any:
        """The policy's `Options` from a table of settings. Raises ConfigError naming what is wrong."""
        return _parse_options(self.entry(name), given)

    def entry(self, name: str) -> Entry[Part]:
        """Raises ConfigError with the nearest names."""
        entry = self._entries.get(name)
        if entry is None:
            raise ConfigError(
                f"`{name}` is not a policy of slot `{self.slot}`",
                hint=f"{nearest(name, self.names())} Run `penstock policies` for the list.",
                param=f"policies.{self.slot}",
            )
        return entry

    def names(self) -> list[str]:
        return sorted(self._entries)

    def entries(self) -> list[Entry[Part]]:
        return [self._entries[name] for name in self.names()]


def _parse_options(entry: Entry[Any], given: Mapping[str, Any]) -> Any:
    where = f"policies.options.{entry.name}"
    known = {item.name: item for item in fields(entry.options)}
    for key in given:
        if key not in known:
            hint = nearest(key, sorted(known)) if known else "This policy has no options."
            raise ConfigError(f"`{where}.{key}` is not an option.", hint=hint, param=where)
    values = {key: coerce_setting(f"{where}.{key}", raw, known[key], "options") for key, raw in given.items()}
    return entry.options(**values)


def nearest(name: str, known: list[str]) -> str:
    """A sentence: what is near, or the whole list where nothing is."""
    return did_you_mean(name, known) or "Known: " + ", ".join(f"`{item}`" for item in known) + "."
