"""Our own request log: one header line, then one JSON object a request. `docs/formats.md` has the schema.

Lengths, times, names and hashed prefix blocks; never text or token ids. Any log Penstock writes can be
described, converted, replayed and simulated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from penstock.core.reasons import FinishReason
from penstock.core.units import ceil_div
from penstock.workloads.fields import (
    answered_or_error,
    blocks_of,
    label_of,
    object_of,
    required,
    shown,
    time_of,
    tokens_of,
)
from penstock.workloads.lines import Lines
from penstock.workloads.trace import TraceRow

NAME = "jsonl"
FORMAT = "penstock-request-log"
VERSION = 1
BLOCK_TOKENS_MAX = 1 << 16
_TURN_MAX = 1 << 20


def claims(first_line: str) -> bool:
    try:
        first = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.get("format") == FORMAT


def rows(lines: Lines) -> Iterator[TraceRow]:
    texts = iter(lines)
    block_tokens = _read_header(lines, next(texts, ""))
    for text in texts:
        if text.strip():
            yield _parse_row(lines, object_of(lines, text), block_tokens)


def header(block_tokens: int) -> dict[str, Any]:
    """Of a log whose rows count prefix blocks of that size (0: no row has blocks)."""
    return {"format": FORMAT, "version": VERSION, "block_tokens": block_tokens}


def header_line(block_tokens: int) -> str:
    """The first line."""
    return json.dumps(header(block_tokens))


def row_line(row: TraceRow, outcome: FinishReason | None = None, ttft_s: float | None = None) -> str:
    """One row as one line of ASCII; optional fields that are absent are left out.

    `outcome` tells more than the row does: how it was answered, or why not.
    """
    fields: dict[str, Any] = {
        "arrival_s": round(row.arrival_s, 7),
        "prompt_tokens": row.prompt_tokens,
        "output_tokens": row.output_tokens,
        "tenant": row.tenant,
        "slo_class": row.slo_class,
        "outcome": outcome or (FinishReason.FAILED if row.failed else FinishReason.STOP),
    }
    if row.model is not None:
        fields["model"] = row.model
    if row.session_id is not None:
        fields |= {"session_id": row.session_id, "turn": row.turn}
    if row.tool is not None:
        fields["tool"] = row.tool
    if row.is_last_turn:
        fields["is_last_turn"] = True
    if row.elapsed_s is not None:
        fields["elapsed_s"] = round(row.elapsed_s, 7)
    if ttft_s is not None:
        fields["ttft_s"] = round(ttft_s, 7)
    if row.block_hashes is not None:
        fields["block_hashes"] = row.block_hashes
    if row.output_block_hashes is not None:
        fields["output_block_hashes"] = row.output_block_hashes
    return json.dumps(fields)


def block_counts(prompt_tokens: int, output_tokens: int, block_tokens: int) -> tuple[int, int]:
    """How many ids a row has: the prompt's blocks, the last perhaps partial, and those the output filled."""
    full_before = prompt_tokens // block_tokens
    return ceil_div(prompt_tokens, block_tokens), (
        prompt_tokens + output_tokens
    ) // block_tokens - full_before


def _read_header(lines: Lines, text: str) -> int:
    header = object_of(lines, text)
    if header.get("format") != FORMAT:
        raise lines.error("format", f"it is not `{FORMAT}`", "begin the file with the header line")
    if header.get("version") != VERSION:
        problem = f"version {shown(header.get('version'))} is unknown"
        raise lines.error("version", problem, f"this Penstock reads version {VERSION}")
    block_tokens = tokens_of(lines, "block_tokens", header.get("block_tokens", 0))
    if block_tokens > BLOCK_TOKENS_MAX:
        raise lines.error("block_tokens", "the blocks are too large", f"at most {BLOCK_TOKENS_MAX} tokens")
    return block_tokens


def _parse_row(lines: Lines, row: Mapping[str, Any], block_tokens: int) -> TraceRow:
    prompt_tokens = tokens_of(lines, "prompt_tokens", required(lines, row, "prompt_tokens"))
    output_tokens = tokens_of(lines, "output_tokens", required(lines, row, "output_tokens"))
    failed = _parse_outcome(lines, row.get("outcome", FinishReason.STOP)) or output_tokens == 0
    if not failed:
        answered_or_error(lines, "prompt_tokens", prompt_tokens)
    turn = tokens_of(lines, "turn", row.get("turn", 0))
    if turn > _TURN_MAX:
        raise lines.error("turn", f"{turn} is out of range", f"turns count from 0 to {_TURN_MAX}")
    prompt_blocks, output_blocks = block_counts(prompt_tokens, output_tokens, max(1, block_tokens))
    return TraceRow(
        arrival_s=time_of(lines, "arrival_s", required(lines, row, "arrival_s")),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        tenant=label_of(lines, "tenant", row.get("tenant", "default")),
        slo_class=label_of(lines, "slo_class", row.get("slo_class", "default")),
        model=_optional_label(lines, row, "model"),
        session_id=_optional_label(lines, row, "session_id"),
        turn=turn,
        block_hashes=_parse_blocks(lines, row, "block_hashes", prompt_blocks, block_tokens),
        output_block_hashes=_parse_blocks(lines, row, "output_block_hashes", output_blocks, block_tokens),
        block_tokens=block_tokens,
        elapsed_s=None if row.get("elapsed_s") is None else time_of(lines, "elapsed_s", row["elapsed_s"]),
        failed=failed,
        tool=_optional_label(lines, row, "tool"),
        is_last_turn=_parse_flag(lines, row, "is_last_turn"),
    )


def _parse_outcome(lines: Lines, outcome: Any) -> bool:
    """Whether the request went unanswered."""
    try:
        return FinishReason(outcome) not in (FinishReason.STOP, FinishReason.LENGTH)
    except ValueError:
        hint = "it is one of " + ", ".join(FinishReason)
        raise lines.error("outcome", f"{shown(outcome)} is unknown", hint) from None


def _parse_blocks(
    lines: Lines, row: Mapping[str, Any], field: str, expected: int, block_tokens: int
) -> tuple[int, ...] | None:
    value = row.get(field)
    if value is None:
        return None
    if block_tokens == 0:
        hint = "put `block_tokens` into the header line"
        raise lines.error(field, "the header gives no block size", hint)
    return blocks_of(lines, field, value, expected)


def _parse_flag(lines: Lines, row: Mapping[str, Any], field: str) -> bool:
    value = row.get(field)
    if value is not None and not isinstance(value, bool):
        raise lines.error(field, f"{shown(value)} is not true or false", "leave it out where it is not known")
    return value is True


def _optional_label(lines: Lines, row: Mapping[str, Any], field: str) -> str | None:
    value = row.get(field)
    return None if value is None else label_of(lines, field, value)
