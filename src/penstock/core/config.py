"""From what the user wrote to the settings the program runs on.

One sentence of precedence: flags override the environment, the environment overrides the file, the file
overrides the preset, the preset overrides the defaults. Every value remembers where it came from. Unknown
keys, wrong types and numbers out of bounds are errors that name the key, its origin and the way out.

`resolve` is pure: the file's text, the environment and the flags are handed in.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from penstock.core.errors import ConfigError, did_you_mean
from penstock.core.metrics import Slo
from penstock.core.settings import Settings, TenantSettings

ENV_PREFIX = "PENSTOCK_"
DEFAULT_PRESET = "penstock"  # docs/policies.md has the evidence
# Environment names of ours that are no settings.
ENV_OTHER = frozenset({"PENSTOCK_CACHE_DIR", "PENSTOCK_MARCH", "PENSTOCK_PURE"})
SECRET_KEYS = frozenset({"gateway.api_keys"})

_SLO_KEYS = {"ttft_p99_ms": "ttft_ms", "tpot_p99_ms": "tpot_ms", "e2e_p99_ms": "e2e_ms"}
_NAMED_TABLES = ("slo", "tenants")  # tables of tables, whose names are the user's
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
    from_file, slos, tenants = _read_file(file_text, file_name, known)
    from_env = _read_environment(environ, known)
    from_flags = {key: value for key, value in flags.items() if value is not None}
    layers = [(from_file, f"file {file_name}"), (from_env, "environment"), (from_flags, "flag")]

    values = {key: default_of(field) for key, field in known.items()}
    origins = dict.fromkeys(values, "default")
    preset = next((layer["preset"] for layer, _ in reversed(layers) if layer.get("preset")), DEFAULT_PRESET)
    values["preset"] = preset
    layers.insert(0, (_flatten_preset(load_preset(str(preset))), f"preset {preset}"))
    for layer, origin in layers:
        for key, raw in layer.items():
            value = coerce_setting(key, raw, known[key], origin)
            values[key] = _merged(values[key], value) if isinstance(value, dict) else value
            origins[key] = origin
    for section, tables in (("slo", slos), ("tenants", tenants)):
        values |= {f"{section}.{name}": table for name, table in tables.items()}
        origins |= {f"{section}.{name}": f"file {file_name}" for name in tables}
    return Resolved(_build(values, slos, tenants), origins, values)


def environment_name(key: str) -> str:
    """`replica.kv_memory` → `PENSTOCK_REPLICA_KV_MEMORY`."""
    return ENV_PREFIX + key.replace(".", "_").upper()


def setting_help() -> list[tuple[str, str, Any]]:
    """(key, help, default) of every setting, for the reference."""
    return [
        (key, field.metadata.get("help", ""), default_of(field)) for key, field in _known_fields().items()
    ]


def setting_bounds() -> dict[str, tuple[float | None, float | None]]:
    """Key → (least, greatest) number allowed, of every setting; None where there is no bound."""
    return {
        key: (field.metadata.get("low"), field.metadata.get("high")) for key, field in _known_fields().items()
    }


def _known_fields() -> dict[str, Field[Any]]:
    """Dotted key → field, of all plain settings; `[slo.*]` and `[tenants.*]` are read by themselves."""
    known: dict[str, Field[Any]] = {}
    hints = get_type_hints(Settings)
    for field in fields(Settings):
        kind = hints[field.name]
        if is_dataclass(kind):
            known |= {f"{field.name}.{inner.name}": inner for inner in fields(kind)}
        elif field.name not in _NAMED_TABLES:
            known[field.name] = field
    return known


def default_of(field: Field[Any]) -> Any:
    """What the field holds when nothing is said."""
    return field.default_factory() if callable(field.default_factory) else field.default


def _read_file(
    text: str | None, name: str, known: Mapping[str, Field[Any]]
) -> tuple[dict[str, Any], dict[str, Slo], dict[str, TenantSettings]]:
    if text is None:
        return {}, {}, {}
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{name} is not valid TOML: {error}", hint="See `docs/config.md` for an example."
        ) from error
    slos = _read_slos(tree.pop("slo", {}), name)
    tenants = _read_tenants(tree.pop("tenants", {}), name)
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    for key in flat:
        if key not in known:
            raise _unknown_key(key, list(known), f"in {name}")
    return flat, slos, tenants


def _named_tables(section: str, tree: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(tree, dict):
        raise ConfigError(f"`{section}` in {name} must be tables", hint=f"Write `[{section}.NAME]`.")
    for inner, table in tree.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"`{section}.{inner}` in {name} must be a table", hint=f"Write `[{section}.{inner}]`."
            )
        yield inner, table


def _read_tenants(tree: Any, name: str) -> dict[str, TenantSettings]:
    known = {item.name: item for item in fields(TenantSettings)}
    tenants = {}
    for tenant, table in _named_tables("tenants", tree, name):
        for key in table:
            if key not in known:
                raise _unknown_key(
                    f"tenants.{tenant}.{key}", [f"tenants.{tenant}.{k}" for k in known], f"in {name}"
                )
        tenants[tenant] = TenantSettings(
            **{
                key: coerce_setting(f"tenants.{tenant}.{key}", raw, known[key], f"file {name}")
                for key, raw in table.items()
            }
        )
    return tenants


def _read_slos(tree: Any, name: str) -> dict[str, Slo]:
    slos = {}
    for slo_class, targets in _named_tables("slo", tree, name):
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


def coerce_setting(key: str, raw: Any, field: Field[Any], origin: str) -> Any:
    """`raw` in the type of the field's default, within its bounds. Raises ConfigError naming `key`."""
    default = default_of(field)
    try:
        value = _convert(raw, default)
    except ValueError as error:
        raise ConfigError(
            f"`{key}` ({origin}) is {raw!r}, but {error}", hint=str(field.metadata.get("help", "")) + "."
        ) from None
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"`{key}` ({origin}) is {value!r}.", hint=f"Write one of {', '.join(choices)}.")
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
        items = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise ValueError("must be a list of strings")
        return tuple(item.strip() for item in items if item.strip())
    if isinstance(default, int | float):
        return _convert_number(raw, type(default))
    if isinstance(default, dict):
        return _convert_tables(raw)
    if not isinstance(raw, str):
        raise ValueError("must be a string")
    return raw


def _convert_tables(raw: Any) -> dict[str, dict[str, Any]]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise ValueError("must be JSON") from None
    if not isinstance(raw, dict) or not all(isinstance(table, dict) for table in raw.values()):
        raise ValueError("must be a table of tables")
    return raw


def _merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Tables of a layer laid over those of the layers below it, key by key."""
    return low | {name: low.get(name, {}) | table for name, table in high.items()}


def _convert_number(raw: Any, kind: type[int] | type[float]) -> int | float:
    noun = "an integer" if kind is int else "a number"
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError(f"must be {noun}")
    if kind is int and isinstance(raw, float):
        raise ValueError(f"must be {noun}")
    try:
        value = kind(raw)
    except (ValueError, OverflowError):
        raise ValueError(f"must be {noun}") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be finite")
    return value


def _build(values: Mapping[str, Any], slos: dict[str, Slo], tenants: dict[str, TenantSettings]) -> Settings:
    named: dict[str, Any] = {"slo": slos, "tenants": tenants}
    hints = get_type_hints(Settings)
    arguments: dict[str, Any] = {}
    for field in fields(Settings):
        kind = hints[field.name]
        if field.name in named:
            arguments[field.name] = named[field.name]
        elif is_dataclass(kind):
            inner = {item.name: values[f"{field.name}.{item.name}"] for item in fields(kind)}
            arguments[field.name] = kind(**inner)  # type: ignore[operator]
        else:
            arguments[field.name] = values[field.name]
    return Settings(**arguments)


def _unknown_key(key: str, known: list[str], where: str) -> ConfigError:
    return ConfigError(
        f"`{key}` {where} is not a setting",
        hint=f"{did_you_mean(key, known)} `penstock config show` lists them all.".lstrip(),
    )


def _masked(value: Any) -> str:
    return f"<{len(value)} set>" if value else "<none>"
