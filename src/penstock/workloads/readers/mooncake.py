"""Mooncake traces (kvcache-ai/Mooncake, FAST25 release, Apache-2.0): one JSON object a line.

    {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [chained blocks of 512]}

The same id means the same content after the same prefix; the last block may be partial. Stamps are
quantised to about 3 s: `--spread-s 3` spreads the rows that share one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from penstock.core.units import ceil_div
from penstock.workloads.fields import answered_or_error, blocks_of, object_of, required, time_of, tokens_of
from penstock.workloads.lines import Lines
from penstock.workloads.trace import TraceRow

NAME = "mooncake"
BLOCK_TOKENS = 512


def claims(first_line: str) -> bool:
    try:
        first = json.loads(first_line)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.keys() >= {"timestamp", "input_length", "output_length"}


def rows(lines: Lines) -> Iterator[TraceRow]:
    for line in lines:
        if not line.strip():
            continue
        row = object_of(lines, line)
        prompt_tokens = tokens_of(lines, "input_length", required(lines, row, "input_length"))
        output_tokens = tokens_of(lines, "output_length", required(lines, row, "output_length"))
        if output_tokens:
            answered_or_error(lines, "input_length", prompt_tokens)
        ids = row.get("hash_ids")
        yield TraceRow(
            arrival_s=time_of(lines, "timestamp", required(lines, row, "timestamp")) / 1e3,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            block_hashes=None
            if ids is None
            else blocks_of(lines, "hash_ids", ids, ceil_div(prompt_tokens, BLOCK_TOKENS)),
            block_tokens=BLOCK_TOKENS,
            failed=output_tokens == 0,
        )
