"""Scripts as JSON files, so that a failure can be kept, sent and replayed.

A file is somebody's: it is read within bounds, and every field is checked before anything runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, Field, asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from penstock.core.errors import ConfigError
from penstock.policies.stack import lanes_split, make_stack
from penstock.twin.vopr.script import Call, Fault, Script, System

SCRIPT_BYTES_MAX = 4 << 20
CALLS_MAX = 4096
FAULTS_MAX = 16384
TOKENS_MAX = 500_000
NAME_LEN_MAX = 64
KIND = "penstock-vopr-script"
VERSION = 1

_HINT = "`penstock vopr SEED --out FILE` writes such files."

Record = TypeVar("Record", System, Call, Fault)


def write_script(script: Script, path: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps(script_json(script), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be written: {error.strerror}", param="out") from None


def script_json(script: Script) -> dict[str, Any]:
    """What differs from the defaults, in plain JSON types."""
    return {
        "kind": KIND,
        "version": VERSION,
        "seed": script.seed,
        "system": asdict(script.system),
        "calls": [_lean(call) for call in script.calls],
        "faults": [_lean(fault) for fault in script.faults],
    }


def read_script(path: Path) -> Script:
    """Raises ConfigError naming the file and the field."""
    try:
        with path.open("rb") as file:
            content = file.read(SCRIPT_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}", param="script") from None
    if len(content) > SCRIPT_BYTES_MAX:
        raise ConfigError(f"`{path}` is larger than {SCRIPT_BYTES_MAX} bytes", hint=_HINT, param="script")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` is no JSON: {error}", hint=_HINT, param="script") from None
    return parse_script(data)


def parse_script(data: Any) -> Script:
    """Pure. Raises ConfigError naming the field."""
    if not isinstance(data, dict) or (data.get("kind"), data.get("version")) != (KIND, VERSION):
        raise _wrong("kind", f"must be `{KIND}`, version {VERSION}")
    unknown = data.keys() - {"kind", "version", "seed", "system", "calls", "faults"}
    if unknown:
        raise _wrong(sorted(unknown)[0], "is not known")
    seed = data.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise _wrong("seed", "must be a non-negative integer")
    system = _record(System, data.get("system", {}), "system")
    calls = _records(Call, data.get("calls", []), "calls", CALLS_MAX)
    faults = _records(Fault, data.get("faults", []), "faults", FAULTS_MAX)
    _check_policies(system)
    if len({call.name for call in calls}) != len(calls):
        raise _wrong("calls", "must have names of their own")
    script = Script(seed, system, calls, faults)
    if script.tokens > TOKENS_MAX:
        raise _wrong("calls", f"ask for {script.tokens} tokens in all, of at most {TOKENS_MAX}")
    return script


def _lean(record: Call | Fault) -> dict[str, Any]:
    return {
        item.name: value for item in fields(record) if (value := getattr(record, item.name)) != item.default
    }


def _records(kind: type[Record], data: Any, where: str, count_max: int) -> tuple[Record, ...]:
    if not isinstance(data, list) or len(data) > count_max:
        raise _wrong(where, f"must be a list of at most {count_max}")
    return tuple(_record(kind, item, f"{where}[{index}]") for index, item in enumerate(data))


def _record(kind: type[Record], data: Any, where: str) -> Record:
    if not isinstance(data, dict):
        raise _wrong(where, "must be an object")
    known = {item.name: item for item in fields(kind)}
    unknown = data.keys() - known.keys()
    if unknown:
        raise _wrong(f"{where}.{sorted(unknown)[0]}", "is not known")
    missing = [name for name, item in known.items() if item.default is MISSING and name not in data]
    if missing:
        raise _wrong(f"{where}.{missing[0]}", "is missing")
    types = get_type_hints(kind)
    return kind(**{name: _value(types[name], known[name], data[name], f"{where}.{name}") for name in data})


def _value(wanted: Any, item: Field[Any], value: Any, where: str) -> Any:
    if issubclass(wanted, StrEnum):
        known = [each.value for each in wanted]
        if value not in known:
            raise _wrong(where, f"must be one of {', '.join(known)}")
        return wanted(value)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise _wrong(where, f"must be of type {wanted.__name__}")
    if wanted is str and len(value) > NAME_LEN_MAX:
        raise _wrong(where, f"must have at most {NAME_LEN_MAX} characters")
    if wanted in (int, float):
        low, high = item.metadata["low"], item.metadata["high"]
        if not math.isfinite(value) or not low <= value <= high:
            raise _wrong(where, f"must be between {low:g} and {high:g}")
    return value


def _check_policies(system: System) -> None:
    if lanes_split(system.policies) and not system.exact:
        raise _wrong("system.exact", "must be true where there are lanes")
    if lanes_split(system.policies) and system.host_kv_blocks:
        raise _wrong("system.host_kv_blocks", "must be 0 where there are lanes")
    make_stack(system.policies)  # raises with the nearest names, or for policies that conflict


def _wrong(where: str, what: str) -> ConfigError:
    return ConfigError(f"script: `{where}` {what}", hint=_HINT, param=where)
