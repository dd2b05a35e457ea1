"""Turn one field of a trace row into a number or a label, or say which field is wrong and why.

All functions are pure but for reading `lines.number` when they raise TraceError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from penstock.core.errors import TraceError
from penstock.workloads.lines import Lines

LENGTH_TOKENS_MAX = 1 << 24  # far above any context served today; a larger value is a broken column
TIME_S_MAX = 1e11  # the year 5138 as Unix time; larger means milliseconds in a seconds column
LABEL_CHARS_MAX = 200
BLOCKS_MAX = 1 << 18
BLOCK_HASH_MAX = (1 << 64) - 1

_TOKENS_HINT = f"token counts are whole numbers from 0 to {LENGTH_TOKENS_MAX}"
_TIME_HINT = "times are finite seconds, 0 or later"


def shown(value: object) -> str:
    """A short, printable form of an untrusted value, for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def time_of_text(lines: Lines, field: str, text: str) -> float:
    try:
        return time_of(lines, field, float(text))
    except ValueError:
        raise lines.error(field, f"{shown(text)} is not a time", _TIME_HINT) from None


def time_of(lines: Lines, field: str, value: Any) -> float:
    """Seconds from a JSON number. Booleans, NaN, infinities and negative values are refused."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise lines.error(field, f"{shown(value)} is not a time", _TIME_HINT)
    if not 0 <= value <= TIME_S_MAX:  # false for NaN too
        problem = "is not finite" if not math.isfinite(value) else "is out of range"
        raise lines.error(field, f"{shown(value)} {problem}", _TIME_HINT)
    return float(value)


def tokens_of_text(lines: Lines, field: str, text: str) -> int:
    # isdecimal alone admits other scripts' digits, and int() admits underscores and spaces
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise lines.error(field, f"{shown(text)} is not a token count", _TOKENS_HINT)
    return tokens_of(lines, field, int(text))


def tokens_of(lines: Lines, field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LENGTH_TOKENS_MAX:
        raise lines.error(field, f"{shown(value)} is not a token count", _TOKENS_HINT)
    return value


def label_of(lines: Lines, field: str, value: Any) -> str:
    """A name that may be printed as it is: control characters would reach somebody's terminal."""
    if not isinstance(value, str) or not 1 <= len(value) <= LABEL_CHARS_MAX or not value.isprintable():
        hint = f"names are 1 to {LABEL_CHARS_MAX} printable characters"
        raise lines.error(field, f"{shown(value)} is not a name", hint)
    return value


def blocks_of(lines: Lines, field: str, value: Any, expected: int) -> tuple[int, ...]:
    """Block ids, exactly as many as the row's lengths make."""
    if not isinstance(value, list) or len(value) > BLOCKS_MAX:
        raise lines.error(field, f"{shown(value)} is not a list of block ids", "write a list of integers")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= BLOCK_HASH_MAX:
            raise lines.error(field, f"{shown(item)} is not a block id", "ids are integers of 0 to 64 bits")
    if len(value) != expected:
        problem = f"there are {len(value)} block ids, and the row's lengths make {expected}"
        raise lines.error(field, problem, "docs/formats.md says how many blocks a length makes")
    return tuple(value)


def object_of(lines: Lines, line: str) -> Mapping[str, Any]:
    """One JSON object from one line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise lines.error(None, f"{shown(line)} is not JSON", "write one JSON object a line") from None
    if not isinstance(value, dict):
        raise lines.error(None, f"{shown(value)} is not a JSON object", "write one JSON object a line")
    return value


def required(lines: Lines, row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise lines.error(field, "the key is missing", f"this row has {shown(sorted(row))}")
    return row[field]


def answered_or_error(lines: Lines, prompt_field: str, prompt_tokens: int) -> None:
    """An answered request had a prompt: zero there is a broken row, not a short request."""
    if prompt_tokens == 0:
        raise lines.error(prompt_field, "an answered request has no prompt tokens", "the row is damaged")


def unknown_format(name: str, first_line: str, names: str) -> TraceError:
    return TraceError(
        f"`{name}` line 1: no known trace format begins with {shown(first_line)}.",
        hint=f"known formats are {names}; `--format` overrides the detection",
    )
