"""Rows sent to a server over HTTP, for commands that measure one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace as changed
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.workloads.replay import ReplayOptions, ReplayRun
    from penstock.workloads.trace import TraceRow


def send_rows(url: str, rows: Sequence[TraceRow], options: ReplayOptions, vocab_size: int) -> ReplayRun:
    """Replay the rows on completions of token ids, and wait for the last answer."""
    return asyncio.run(_send(url, rows, options, vocab_size))


async def _send(url: str, rows: Sequence[TraceRow], options: ReplayOptions, vocab_size: int) -> ReplayRun:
    from penstock.workloads.progress import NoProgress
    from penstock.workloads.replay import replay
    from penstock.workloads.target import base_url_of, find_target, open_client

    base_url = base_url_of(url)
    async with open_client(base_url, None, options.concurrency_max) as client:
        target = await find_target(client, base_url, None, "completions")
        target = changed(target, vocab_size=target.vocab_size or vocab_size)
        return await replay(rows, client, target, options, NoProgress(), asyncio.Event())
