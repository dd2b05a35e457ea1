"""From what the user wrote to the settings the program runs on.

One sentence of precedence: flags override the environment, the environment overrides the file, the file
overrides the preset, the preset overrides the defaults. Every value remembers where it came from. Unknown
keys, wrong types and numbers out of bounds are errors that name the key, its origin and the way out.

`resolve` is pure: the file's text, the environment and the flags are handed in.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from penstock.core.errors import ConfigError
from penstock.core.metrics import Slo
from penstock.core.settings import Settings

ENV_PREFIX = "PENSTOCK_"
# Environment names of ours that are no settings.
ENV_OTHER = frozenset({"PENSTOCK_CACHE_DIR", "PENSTOCK_MARCH"})
SECRET_KEYS = frozenset({"gateway.api_keys"})

_SLO_KEYS = {"ttft_p99_ms": "ttft_ms", "tpot_p99_ms": "tpot_ms", "e2e_p99_ms": "e2e_ms"}
_BOOLEANS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The settings, and for each dotted key where its value came from."""

    settings: Settings
    origins: dict[str, str]
    values: dict[str, Any]

    def shown(self) -> list[tuple[str, Any, str]]:
        """(key, value, origin) of every setting, secrets masked."""
        return [
            (key, _masked(value) if key in SECRET_KEYS else value, self.origins[key])
            for key, value in sorted(self.values.items())
        ]


def resolve(
    *,
    file_text: str | None,
    file_name: str,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    load_preset: Callable[[str], dict[str, Any]],
) -> Resolved:
    """Merge the layers. `flags` maps dotted keys to values; None means not given. Raises ConfigError."""
    known = _known_fields()
    from_file, slos = _read_file(file_text, file_name, known)
    from_env = _read_environment(environ, known)
    from_flags = {key: value for key, value in flags.items() if value is not None}
    layers = [(from_file, f"file {file_name}"), (from_env, "environment"), (from_flags, "flag")]

    values = {key: _default(field) for key, field in known.items()}
    origins = dict.fromkeys(values, "default")
    preset = next((layer["preset"] for layer, _ in reversed(layers) if layer.get("preset")), None)
    if preset is not None:
        layers.insert(0, (_flatten_preset(load_preset(str(preset))), f"preset {preset}"))
    for layer, origin in layers:
        for key, raw in layer.items():
            values[key] = _coerce(key, raw, known[key], origin)
            origins[key] = origin
    for name, slo in slos.items():
        values[f"slo.{name}"] = slo
        origins[f"slo.{name}"] = f"file {file_name}"
    return Resolved(_build(values, slos), origins, values)


def environment_name(key: str) -> str:
    """`replica.kv_memory` → `PENSTOCK_REPLICA_KV_MEMORY`."""
    return ENV_PREFIX + key.replace(".", "_").upper()


def setting_help() -> list[tuple[str, str, Any]]:
    """(key, help, default) of every setting, for the reference."""
    return [(key, field.metadata.get("help", ""), _default(field)) for key, field in _known_fields().items()]


def setting_bounds() -> dict[str, tuple[float | None, float | None]]:
    """Key → (least, greatest) number allowed, of every setting; None where there is no bound."""
    return {
        key: (field.metadata.get("low"), field.metadata.get("high")) for key, field in _known_fields().items()
    }


def _known_fields() -> dict[str, Field[Any]]:
    """Dotted key → field, of all plain settings; `[slo.*]` is read by itself."""
    known: dict[str, Field[Any]] = {}
    hints = get_type_hints(Settings)
    for field in fields(Settings):
        kind = hints[field.name]
        if is_dataclass(kind):
            known |= {f"{field.name}.{inner.name}": inner for inner in fields(kind)}
        elif field.name != "slo":
            known[field.name] = field
    return known


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _read_file(
    text: str | None, name: str, known: Mapping[str, Field[Any]]
) -> tuple[dict[str, Any], dict[str, Slo]]:
    if text is None:
        return {}, {}
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{name} is not valid TOML: {error}", hint="See `docs/config.md` for an example."
        ) from error
    slos = _read_slos(tree.pop("slo", {}), name)
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    for key in flat:
        if key not in known:
            raise _unknown_key(key, list(known), f"in {name}")
    return flat, slos


def _read_slos(tree: Any, name: str) -> dict[str, Slo]:
    slos = {}
    for slo_class, targets in tree.items() if isinstance(tree, dict) else ():
        if not isinstance(targets, dict):
            raise ConfigError(
                f"`slo.{slo_class}` in {name} must be a table", hint=f"Write `[slo.{slo_class}]`."
            )
        for key, value in targets.items():
            if key not in _SLO_KEYS:
                raise _unknown_key(
                    f"slo.{slo_class}.{key}", [f"slo.{slo_class}.{k}" for k in _SLO_KEYS], f"in {name}"
                )
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise ConfigError(
                    f"`slo.{slo_class}.{key}` must be a positive number of milliseconds, not {value!r}"
                )
        slos[slo_class] = Slo(**{_SLO_KEYS[key]: float(value) for key, value in targets.items()})
    return slos


def _read_environment(environ: Mapping[str, str], known: Mapping[str, Field[Any]]) -> dict[str, str]:
    key_of = {environment_name(key): key for key in known}
    found = {}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name in ENV_OTHER:
            continue
        if name not in key_of:
            raise _unknown_key(name, list(key_of), "in the environment")
        found[key_of[name]] = value
    return found


def _flatten_preset(preset: dict[str, Any]) -> dict[str, Any]:
    tables = {section: table for section, table in preset.items() if isinstance(table, dict)}
    return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}


def _coerce(key: str, raw: Any, field: Field[Any], origin: str) -> Any:
    """`raw` in the type of the field's default, within its bounds."""
    default = _default(field)
    try:
        value = _convert(raw, default)
    except ValueError as error:
        raise ConfigError(
            f"`{key}` ({origin}) is {raw!r}, but {error}", hint=str(field.metadata.get("help", "")) + "."
        ) from None
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if low is not None and value < low or high is not None and value > high:
        bounds = f"at least {low:g}" if high is None else f"from {low or 0:g} to {high:g}"
        raise ConfigError(f"`{key}` ({origin}) is {value!r}, but must be {bounds}.")
    return value


def _convert(raw: Any, default: Any) -> Any:
    if isinstance(default, bool):
        value = _BOOLEANS.get(str(raw).strip().lower())
        if value is None:
            raise ValueError("must be true or false")
        return value
    if isinstance(default, tuple):
        items = raw.split(",") if isinstance(raw, str) else list(raw)
        if not all(isinstance(item, str) for item in items):
            raise ValueError("must be a list of strings")
        return tuple(item.strip() for item in items if item.strip())
    if isinstance(default, int | float):
        return _convert_number(raw, type(default))
    if not isinstance(raw, str):
        raise ValueError("must be a string")
    return raw


def _convert_number(raw: Any, kind: type[int] | type[float]) -> int | float:
    noun = "an integer" if kind is int else "a number"
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError(f"must be {noun}")
    if kind is int and isinstance(raw, float):
        raise ValueError(f"must be {noun}")
    try:
        value = kind(raw)
    except ValueError:
        raise ValueError(f"must be {noun}") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be finite")
    return value


def _build(values: Mapping[str, Any], slos: dict[str, Slo]) -> Settings:
    hints = get_type_hints(Settings)
    arguments: dict[str, Any] = {}
    for field in fields(Settings):
        kind = hints[field.name]
        if field.name == "slo":
            arguments["slo"] = slos
        elif is_dataclass(kind):
            inner = {item.name: values[f"{field.name}.{item.name}"] for item in fields(kind)}
            arguments[field.name] = kind(**inner)  # type: ignore[operator]
        else:
            arguments[field.name] = values[field.name]
    return Settings(**arguments)


def _unknown_key(key: str, known: list[str], where: str) -> ConfigError:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    meant = "Did you mean " + " or ".join(f"`{item}`" for item in close) + "? " if close else ""
    return ConfigError(
        f"`{key}` {where} is not a setting", hint=f"{meant}`penstock config show` lists them all."
    )


def _masked(value: Any) -> str:
    return f"<{len(value)} set>" if value else "<none>"
