"""Azure LLM inference traces 2023 and 2024 (Azure/AzurePublicDataset, CC-BY).

    TIMESTAMP, ContextTokens, GeneratedTokens

2023 stamps are `2023-11-16 18:15:46.6805900` (seven digits, UTC, no zone); 2024 stamps end in `+00:00` and
have six digits or none at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache

from penstock.workloads.fields import answered_or_error, shown, tokens_of_text
from penstock.workloads.lines import Lines
from penstock.workloads.readers.tables import Table, header_of
from penstock.workloads.trace import TraceRow

NAME = "azure"
_REQUIRED = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)


def claims(first_line: str) -> bool:
    return header_of(first_line) >= set(_REQUIRED)


def rows(lines: Lines) -> Iterator[TraceRow]:
    """Rows in file order, seconds from midnight UTC of the first row's day.

    A row that generated nothing is a failure. The day is taken off before the fraction is added, so that the
    100 ns of the 2023 files survive in a float.
    """
    table = Table(lines, _REQUIRED)
    time_at, prompt_at, output_at = (table.header.index(name) for name in _REQUIRED)
    day_s: int | None = None
    for row in table:
        whole_s, fraction_s = _parse_stamp(lines, row[time_at])
        if day_s is None:
            day_s = whole_s - whole_s % 86400
        if whole_s < day_s:
            raise lines.error("TIMESTAMP", "the time goes back by days", "order the rows by time")
        prompt_tokens = tokens_of_text(lines, "ContextTokens", row[prompt_at])
        output_tokens = tokens_of_text(lines, "GeneratedTokens", row[output_at])
        if output_tokens:
            answered_or_error(lines, "ContextTokens", prompt_tokens)
        yield TraceRow(
            arrival_s=whole_s - day_s + fraction_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            failed=output_tokens == 0,
        )


def _parse_stamp(lines: Lines, text: str) -> tuple[int, float]:
    """(whole Unix seconds, fraction of a second)."""
    match = _STAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        fraction = match[2]
        return _unix_s(match[1], match[3] or "Z"), int(fraction) / 10 ** len(fraction) if fraction else 0.0
    except (ValueError, OverflowError):
        hint = "write `2023-11-16 18:15:46.6805900` or `2024-05-10 00:00:00+00:00`"
        raise lines.error("TIMESTAMP", f"{shown(text)} is not a time", hint) from None


@lru_cache(maxsize=256)
def _unix_s(text: str, zone: str) -> int:
    """Neighbouring rows share their second, hence the cache."""
    moment = datetime.fromisoformat(text + ("+00:00" if zone == "Z" else zone))
    return int(moment.astimezone(UTC).timestamp())
