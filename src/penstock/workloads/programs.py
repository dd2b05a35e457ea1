"""Runs of agents, generated: turns of one growing conversation, with a tool between each two.

    turn 1: system + task ─► answer ─► tool runs ─► turn 2: all of that + result ─► answer ─► … ─► last turn

The rows are a trace of a closed loop: a row's arrival less that of the turn before is the time its tool
took, with no time for the answer, which whoever serves the trace adds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.workloads.trace import TraceRow


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool and how long it takes: exponential around `mean_s`, or uniform in a slow range now and then."""

    name: str
    mean_s: float
    slow_frac: float = 0.0  # share of calls that take `slow_s` instead
    slow_s: tuple[float, float] = (10.0, 60.0)

    def seconds(self, draw: random.Random) -> float:
        if self.slow_frac and draw.random() < self.slow_frac:
            return draw.uniform(*self.slow_s)
        return draw.expovariate(1.0 / self.mean_s)


# Means from 0.15 to 1.5 s; their mean is near that of SWE-style traces, 0.9 s (card continuum).
TOOLS = tuple(
    Tool(name, mean_s)
    for name, mean_s in (("read", 0.15), ("search", 0.4), ("edit", 0.8), ("shell", 1.2), ("test", 1.5))
)


@dataclass(frozen=True, slots=True)
class ProgramShape:
    """What is drawn. Lengths are tokens; ranges are inclusive and uniform.

    `turns_mean` draws a geometric number of turns instead, at most `turns_max`: many short, some long.
    """

    programs: int
    rate_per_s: float  # of first turns, Poisson
    tools: Sequence[Tool] = TOOLS
    turns: tuple[int, int] = (8, 12)
    turns_mean: float | None = None
    turns_max: int = 40
    prompt_tokens: tuple[int, int] = (2500, 4500)  # of the first turn
    result_tokens: tuple[int, int] = (50, 400)  # a tool's result, before the next turn
    output_tokens: tuple[int, int] = (50, 200)
    block_tokens: int = 16


def program_rows(shape: ProgramShape, seed: int = 1) -> Iterator[TraceRow]:
    """All turns, in order of arrival. The same for the same seed, whatever else is drawn elsewhere."""
    rows: list[TraceRow] = []
    arrivals = random.Random(f"programs/{seed}/arrivals")
    now_s = 0.0
    for number in range(shape.programs):
        now_s += arrivals.expovariate(shape.rate_per_s)
        rows += _turns(shape, number, now_s, random.Random(f"programs/{seed}/{number}"))
    rows.sort(key=lambda row: row.arrival_s)
    return iter(rows)


def _turns(shape: ProgramShape, number: int, start_s: float, draw: random.Random) -> Iterator[TraceRow]:
    turns = _turn_count(shape, draw)
    prompt, at_s = draw.randint(*shape.prompt_tokens), start_s
    first_id = number << 32  # content ids of this program's blocks; nobody else has them
    for turn in range(turns):
        output = draw.randint(*shape.output_tokens)
        tool = draw.choice(shape.tools)
        is_last = turn == turns - 1
        yield TraceRow(
            arrival_s=at_s,
            prompt_tokens=prompt,
            output_tokens=output,
            session_id=f"program-{number}",
            turn=turn,
            elapsed_s=0.0,
            tool=None if is_last else tool.name,
            is_last_turn=is_last,
            **_blocks(first_id, turn, prompt, output, shape.block_tokens),
        )
        at_s += tool.seconds(draw)
        prompt += output + draw.randint(*shape.result_tokens)


def _turn_count(shape: ProgramShape, draw: random.Random) -> int:
    if shape.turns_mean is None:
        return draw.randint(*shape.turns)
    drawn = 1 + int(math.log(1.0 - draw.random()) / math.log(1.0 - 1.0 / shape.turns_mean))
    return min(drawn, shape.turns_max)


def _blocks(first_id: int, turn: int, prompt: int, output: int, block_tokens: int) -> dict[str, Any]:
    """Content ids: block k of the conversation is always k, but for one that is not full and will change."""
    full, rest = divmod(prompt, block_tokens)
    partial = (first_id + (1 << 31) + turn,) if rest else ()
    return {
        "block_tokens": block_tokens,
        "block_hashes": (*range(first_id, first_id + full), *partial),
        "output_block_hashes": tuple(range(first_id + full, first_id + (prompt + output) // block_tokens)),
    }
