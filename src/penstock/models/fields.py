"""Reading a mapping that somebody else wrote: typed, bounded, and named when a value is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from penstock.core.errors import ModelFileDamaged, ModelUnsupported


class Fields:
    """Checked access to an untrusted mapping. A null counts as absent.

    Every failure raises `ModelFileDamaged` that names the field and `where` it stands. Pure.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self.where = where

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __contains__(self, name: str) -> bool:
        """Whether the key is there at all, if only to say null."""
        return name in self._values

    def get(self, name: str) -> object:
        """The raw value, or None; for fields of several types."""
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in [low, high]. Required when there is no default."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.damaged(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A number in [low, high]. Required when there is no default."""
        value = self._present(name, default)
        # The comparison is false for NaN too, and safe for integers beyond the range of a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.damaged(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return self.number(name, low, high) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            self.damaged(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._present(name, default)
        if not isinstance(value, str):
            self.damaged(name, "a string")
        return value

    def items(self, name: str, count_max: int) -> list[object]:
        """A list of at most `count_max` values; absent is empty."""
        value = self._present(name, [])
        if not isinstance(value, list) or len(value) > count_max:
            self.damaged(name, f"a list of at most {count_max} values")
        return value

    def section(self, name: str) -> Fields:
        """A mapping inside this one; absent is empty."""
        value = self._present(name, {})
        if not isinstance(value, Mapping):
            self.damaged(name, "a mapping")
        return Fields(value, f"{self.where}, `{name}`")

    def refuse(self, name: str, reason: str, hint: str) -> NoReturn:
        """The value is a legal one that the engine does not implement."""
        raise ModelUnsupported(
            f"{self.where}: `{name}` is {_shown(self._values.get(name))}, {reason}.", hint=hint
        )

    def damaged(self, name: str, expected: str) -> NoReturn:
        """The value cannot be meant: it is not `expected`."""
        raise ModelFileDamaged(
            f"{self.where}: `{name}` is {_shown(self._values.get(name))}, but must be {expected}.",
            hint="Fetch the file again; it is damaged or not what its name says.",
        )

    def _present(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ModelFileDamaged(
                f"{self.where}: `{name}` is missing.", hint="Fetch the file again, or the complete model."
            )
        return default


def _shown(value: object) -> str:
    """A short text of an untrusted value, for a message. Never longer than 80 characters."""
    if isinstance(value, str | int | float | bool) or value is None:
        try:
            text = repr(value)
        except ValueError:  # an integer of more digits than Python prints
            text = "a huge number"
    else:
        text = f"a {type(value).__name__}"
    return f"`{text if len(text) <= 80 else text[:77] + '...'}`"
