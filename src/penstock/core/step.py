"""One fact describes a step: which sequences compute how many tokens, on which KV blocks.

The same `StepPlan` drives the torch engine and the twin's modelled executor. A sequence travels whole once
(`SequenceStart`); from its first token on it decodes, and every step that says `decode` advances all
decoding sequences by one token, so that they need not be listed. Both sides know who decodes: whoever has
emitted and was not ended since. An empty plan does not exist: the replica answers None when idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from penstock.core.request import SamplingParams


@dataclass(slots=True, repr=False)
class SequenceStart:
    """A sequence enters (or re-enters, after preemption) the executor.

    `tokens` is the prompt, followed after a preemption by the output so far; `cached_len` of them already
    have KV in `blocks`. None where only lengths are known.
    """

    seq_id: int
    request_id: str
    tokens: Sequence[int] | None
    prompt_len: int
    total_len: int  # len(tokens), also when tokens is None
    cached_len: int
    blocks: tuple[int, ...]
    sampling: SamplingParams
    # These tokens may not be drawn while the output is shorter than `min_output_tokens`
    min_output_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def __repr__(self) -> str:
        return (
            f"SequenceStart({self.seq_id}, total_len={self.total_len}, cached_len={self.cached_len}, "
            f"blocks={len(self.blocks)})"
        )


@dataclass(slots=True)
class Chunk:
    """`count` known tokens of one sequence, from position `start`; `emits` when the last is sampled from."""

    seq_id: int
    start: int
    count: int
    emits: bool


class Direction(StrEnum):
    """Which way KV is copied."""

    OUT = "out"  # device to host
    IN = "in"  # host to device


Extent = tuple[int, int, int]  # first device block, first host block, blocks: a run on both sides


@dataclass(frozen=True, slots=True, repr=False)
class Copy:
    """KV of one sequence, moved between device and host. One transfer an extent, layer and cache (K, V)."""

    copy_id: int  # counts the replica's copies
    seq_id: int
    direction: Direction
    extents: tuple[Extent, ...]

    def __repr__(self) -> str:
        return f"Copy({self.copy_id}, {self.direction} of {self.seq_id}, {self.extents})"

    @property
    def block_count(self) -> int:
        return sum(count for _, _, count in self.extents)


@dataclass(frozen=True, slots=True)
class CopyDone:
    """`seconds`: how long the copy itself took, without its wait for the copies before it.

    Not `ok`: what it should have written holds anything. A copy that a step waits for fails the step.
    """

    copy_id: int
    seconds: float
    ok: bool = True


@dataclass(slots=True)
class StepPlan:
    """What the executor does next: chunks of prompts, and one token of each decoding sequence.

    Before anything else it forgets `ends`, takes in `starts`, and appends `new_blocks` to block tables. Then
    it begins `copies`, which run one after the other in the order of all plans, beside the steps. It computes
    when those of `waits` are done; a plan that computes nothing only waits for them.
    """

    index: int
    chunks: list[Chunk]
    decode_count: int  # how many sequences decode: all that can, less `paused`; 0 when decodes wait
    paused: frozenset[int] = frozenset()  # decoding sequences that this step leaves out
    starts: list[SequenceStart] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # seq_ids finished, cancelled or preempted
    new_blocks: list[tuple[int, list[int]]] = field(default_factory=list)  # (seq_id, block ids)
    repeat: int = 1  # how many identical decode steps this plan may stand for
    until_s: float = float("inf")  # and until when: a step that begins at or after it needs a new plan
    copies: Sequence[Copy] = ()
    waits: Sequence[int] = ()  # copy_ids, of this plan or of earlier ones

    @property
    def token_count(self) -> int:
        return sum(chunk.count for chunk in self.chunks) + self.decode_count


@dataclass(slots=True)  # not frozen: it crosses a pipe, and the compiled form of a frozen class cannot
class TokenLogprobs:
    """Natural-log probabilities of one position, after temperature-free softmax (as vLLM and OpenAI)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class StepResult:
    """What came of a plan. `duration_s` is the executor's own clock, over all its steps."""

    # seq_id → token, of every emitting chunk and every decode; None where only lengths are known: then
    # `stopped` names the sequences that ended by themselves in the last step.
    tokens: dict[int, int] | None
    stopped: Sequence[int] = ()
    steps: int = 1  # of `repeat`; more than one only without tokens
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # this chunk's positions
    duration_s: float = 0.0
    copied: Sequence[CopyDone] = ()  # what was done by the end of the last step and is not yet told
    stalled_s: float = 0.0  # waited for copies before computing; not in `duration_s`
