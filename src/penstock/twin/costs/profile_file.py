"""Profile files: bounded TOML with a schema version, read field by field and written back.

A profile is somebody's measurement, so nothing in it is trusted: a missing section, a negative, infinite or
NaN number, and an unknown field are each refused by name.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from penstock.core.errors import ConfigError

SCHEMA_VERSION: Final = 1
PROFILE_BYTES_MAX: Final = 1 << 20
NUMBERS_MAX: Final = 4096
TEXT_CHARS_MAX: Final = 2000
_HINT: Final = "Compare with a shipped profile, or write a new one with `penstock calibrate`."


class Section:
    """One table of a profile. Every reader raises ConfigError that names the field. Pure."""

    def __init__(self, values: Mapping[str, Any], path: str, file: str) -> None:
        self._values = values
        self._read: set[str] = set()
        self.path = path
        self.file = file

    def number(self, name: str, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number in [low, high]."""
        value = self._present(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(name, f"is {_shown(value)}, but must be a finite number")
        if not low <= value <= high:
            self.refuse(name, f"is {_shown(value)}, but must lie in [{low:g}, {high:g}]")
        return float(value)

    def positive(self, name: str, high: float = math.inf) -> float:
        value = self.number(name, 0.0, high)
        if value == 0.0:
            self.refuse(name, "is 0, but must be positive")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._present(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"is {_shown(value)}, but must be a whole number from {low} to {high}")
        return value

    def text(self, name: str) -> str:
        value = self._present(name)
        if not isinstance(value, str) or not 0 < len(value) <= TEXT_CHARS_MAX:
            self.refuse(name, f"is {_shown(value)}, but must be a text of at most {TEXT_CHARS_MAX} letters")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers, 0 or more each."""
        value = self._present(name)
        if not isinstance(value, list) or len(value) > NUMBERS_MAX:
            self.refuse(name, f"must be a list of at most {NUMBERS_MAX} numbers")
        items = Section({str(index): item for index, item in enumerate(value)}, self._full(name), self.file)
        return [items.number(str(index)) for index in range(len(value))]

    def section(self, name: str) -> Section:
        """A table that must be there."""
        value = self._present(name)
        if not isinstance(value, dict):
            self.refuse(name, "must be a section")
        return Section(value, self._full(name), self.file)

    def sections(self, name: str) -> dict[str, Section]:
        """The tables inside the table `name`; none where it is absent."""
        if name not in self._values:
            return {}
        parent = self.section(name)
        return {key: parent.section(key) for key in parent.names()}

    def names(self) -> list[str]:
        return list(self._values)

    def is_section(self, name: str) -> bool:
        return isinstance(self._values.get(name), dict)

    def section_paths(self) -> list[str]:
        """Full paths of all tables below that hold a value of their own."""
        paths: list[str] = []
        for name in filter(self.is_section, self._values):
            inner = Section(self._values[name], self._full(name), self.file)
            if not all(map(inner.is_section, inner.names())):
                paths.append(inner.path)
            paths += inner.section_paths()
        return paths

    def done(self) -> None:
        """Refuses fields that nobody asked for: a typo must not become a silent default."""
        for name in self._values:
            if name not in self._read:
                self.refuse(name, "is not a field of a profile")

    def refuse(self, name: str, problem: str) -> NoReturn:
        field = self._full(name)
        raise ConfigError(f"Profile `{self.file}`: `{field}` {problem}.", hint=_HINT, param=field)

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _present(self, name: str) -> Any:
        if name not in self._values:
            self.refuse(name, "is missing")
        self._read.add(name)
        return self._values[name]


def read_profile(path: Path, kind: str) -> Section:
    """The root of a profile of `kind`. Raises ConfigError when it cannot be read or is another kind."""
    try:
        with path.open("rb") as file:
            content = file.read(PROFILE_BYTES_MAX + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"Profile `{path}` cannot be read: {reason}.", hint=_HINT) from error
    if len(content) > PROFILE_BYTES_MAX:
        raise ConfigError(f"Profile `{path}` is larger than {PROFILE_BYTES_MAX} bytes.", hint=_HINT)
    return parse_profile(content, kind, path.name)


def parse_profile(content: bytes, kind: str, file: str) -> Section:
    """The root section. Raises ConfigError. Pure."""
    try:
        values = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"Profile `{file}` is not valid TOML: {error}.", hint=_HINT) from error
    root = Section(values, "", file)
    version = root.integer("schema_version", 1, 1 << 30)
    if version != SCHEMA_VERSION:
        root.refuse("schema_version", f"is {version}, but this build reads version {SCHEMA_VERSION}")
    if root.text("kind") != kind:
        root.refuse("kind", f"is {_shown(values['kind'])}, but a profile of kind `{kind}` is needed")
    return root


def toml_text(values: Mapping[str, Any], comment: str = "") -> str:
    """TOML of nested mappings of numbers, texts and lists of numbers; keys keep their order. Pure."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    _write_table(values, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(values: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if path and (plain or not values):
        lines += ["", "[" + ".".join(_key(part) for part in path) + "]"]
    lines += [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, Mapping):
            _write_table(value, (*path, key), lines)


def _key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isalnum() and bare.isascii() else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    assert isinstance(value, int | float), value
    return repr(value)


def _shown(value: object) -> str:
    text = ascii(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
