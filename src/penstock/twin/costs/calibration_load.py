"""The load that shows a server's steps from all sides: few and many clients, short and long prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from penstock.replica.limits import ReplicaLimits
from penstock.workloads.trace import TraceRow

CLIENTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LONE_REQUESTS: Final = 24  # prompts that meet an idle server
PROMPT_TOKENS_MIN: Final = 4
PROMPT_TOKENS_MAX: Final = 2048
OUTPUT_TOKENS: Final = (16, 96)


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests that so many clients send one after the other, each as soon as its last is answered."""

    clients: int
    rows: list[TraceRow]


def phases(limits: ReplicaLimits, seed: int = 0) -> list[Phase]:
    """A few minutes on a small machine. Prompts are spread evenly over the orders of magnitude. Pure."""
    draw = random.Random(f"calibration/{seed}")
    least, most = (min(tokens, max(1, limits.context_len_max // 2)) for tokens in OUTPUT_TOKENS)
    longest = max(1, min(PROMPT_TOKENS_MAX, limits.context_len_max - most, _kv_share(limits)))
    lone = Phase(1, [_row(draw, longest, (1, min(3, most))) for _ in range(LONE_REQUESTS)])
    counts = [clients for clients in CLIENTS if clients <= limits.running_max]
    return [
        lone,
        *(Phase(n, [_row(draw, longest, (least, most)) for _ in range(2 * n + 4)]) for n in counts),
    ]


def _kv_share(limits: ReplicaLimits) -> int:
    """A prompt of which a few fit the pool, so that calibrating does not preempt."""
    return max(PROMPT_TOKENS_MIN, limits.kv_blocks * limits.kv_block_tokens // 8)


def _row(draw: random.Random, longest: int, output_tokens: tuple[int, int]) -> TraceRow:
    shortest = min(PROMPT_TOKENS_MIN, longest)
    prompt = shortest * (longest / shortest) ** draw.random()
    return TraceRow(0.0, round(prompt), draw.randint(*output_tokens))
