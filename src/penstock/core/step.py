"""One fact describes a step: which sequences compute how many tokens, on which KV blocks.

The same `StepPlan` drives the torch engine and the twin's modelled executor. A sequence travels whole
once (`SequenceStart`), and afterwards only as the difference (`StepItem`). An empty plan does not exist:
the replica answers None when there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.request import SamplingParams


@dataclass(frozen=True, slots=True, repr=False)
class SequenceStart:
    """A sequence enters (or re-enters, after preemption) the executor.

    `tokens` is the prompt, followed after a preemption by the output so far; `cached_len` of them already
    have KV in `blocks`. None where only lengths are known.
    """

    seq_id: int
    tokens: Sequence[int] | None
    prompt_len: int
    total_len: int  # len(tokens), also when tokens is None
    cached_len: int
    blocks: tuple[int, ...]
    sampling: SamplingParams
    # A token that may not be drawn while the output is shorter than this
    min_output_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def __repr__(self) -> str:
        return (
            f"SequenceStart({self.seq_id}, total_len={self.total_len}, cached_len={self.cached_len}, "
            f"blocks={len(self.blocks)})"
        )


@dataclass(slots=True)
class StepItem:
    """`count` tokens of one sequence, from position `start`; `emits` when the last one is sampled from."""

    seq_id: int
    start: int
    count: int
    emits: bool
    new_blocks: tuple[int, ...] = ()


@dataclass(slots=True)
class StepPlan:
    """What the executor does next. `items` keep their order in `StepResult.tokens`."""

    index: int
    items: list[StepItem]
    starts: list[SequenceStart] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # seq_ids to forget before the step: finished or preempted
    repeat: int = 1  # how many identical decode steps this plan may stand for

    @property
    def token_count(self) -> int:
        return sum(item.count for item in self.items)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one position, after temperature-free softmax (as vLLM and OpenAI)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class StepResult:
    """`tokens[i]` belongs to the i-th emitting item of the plan. Seconds are the executor's own clock."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # seq_id → the emitted token's
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # seq_id → this chunk's
    duration_s: float = 0.0
