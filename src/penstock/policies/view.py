"""The windows through which policies look at a replica. Read-only, O(1) to hand over, never a copy."""

from __future__ import annotations

import collections.abc
from dataclasses import dataclass
from typing import Protocol

from penstock.core.reasons import WaitReason
from penstock.core.request import ProgramKey, Request
from penstock.core.units import ceil_div


@dataclass(frozen=True, slots=True)
class CopyFacts:
    """One copy of a sequence's KV that is done. `seconds` without its wait for the copies before it."""

    is_out: bool  # device to host
    blocks: int
    extents: int  # runs of blocks, each copied at once
    seconds: float


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One executed plan, as observers hear of it. `decode_context` is of the first of its `steps`."""

    prefills: tuple[tuple[int, int], ...]  # (new tokens, context after them) of each chunk
    decodes: int
    decode_context: int  # tokens in the KV of all that decoded, their new ones included
    steps: int
    seconds: float  # of all steps together, by the executor's clock


class SequenceView(Protocol):
    """One sequence. Lengths are tokens."""

    @property
    def request(self) -> Request: ...
    @property
    def arrival_index(self) -> int:
        """Counts submissions to this replica; breaks ties, and never changes."""

    @property
    def submitted_s(self) -> float: ...
    @property
    def total_len(self) -> int:
        """Prompt and output so far."""

    @property
    def computed_len(self) -> int:
        """Of these, how many have KV."""

    @property
    def output_len(self) -> int: ...
    @property
    def output_left(self) -> int:
        """Until its maximum."""

    @property
    def is_decoding(self) -> bool:
        """Has output, and exactly one token without KV."""

    @property
    def block_count(self) -> int:
        """KV blocks it holds now, shared ones included."""

    @property
    def first_token_s(self) -> float | None: ...


class PinView(Protocol):
    """KV that a finished turn left pinned for the next turn of its program."""

    @property
    def program(self) -> ProgramKey: ...
    @property
    def until_s(self) -> float: ...
    @property
    def arrival_index(self) -> int:
        """Of the finished turn."""

    @property
    def block_count(self) -> int: ...


class ReplicaView(Protocol):
    """One replica between two steps. Sequences are in rank order.

    `running` = `prefilling` and those that decode. Policies that can do with `prefilling` and
    `decoding_count` cost nothing for the sequences whose state does not change.
    """

    @property
    def running(self) -> collections.abc.Sequence[SequenceView]:
        """Sorted when asked for after a change: O(running log running)."""

    @property
    def running_count(self) -> int: ...
    @property
    def waiting(self) -> collections.abc.Iterable[SequenceView]:
        """In rank order, as of the last plan or submission."""

    @property
    def waiting_count(self) -> int: ...
    def outranks(self, head: SequenceView, other: SequenceView) -> bool:
        """Whether the rank policy lets `head`, which waits, take the place of `other`, which runs."""

    @property
    def decode_clock(self) -> int:
        """Decode steps so far: each advanced every decoding sequence that was not paused by one token."""

    @property
    def decode_context(self) -> int:
        """Tokens in the KV of all decoding sequences."""

    @property
    def prefilling(self) -> collections.abc.Sequence[SequenceView]: ...
    def ranks_before(self, first: SequenceView, second: SequenceView) -> bool:
        """Whether `first` goes before `second`, by the keys of the rank policy."""

    @property
    def decoding_count(self) -> int: ...
    @property
    def blocks_available(self) -> int:
        """Free blocks plus cached blocks that nobody uses."""

    @property
    def blocks_pinned(self) -> int:
        """Blocks that pins hold, some perhaps together with running sequences; none of them is available."""

    @property
    def block_count(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def step_tokens_max(self) -> int: ...
    @property
    def running_max(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """The head of the waiting queue, with what the prefix index holds for it."""

    sequence: SequenceView
    cached_len: int  # tokens found in the prefix index
    blocks_cached: int  # blocks of those
    blocks_revived: int  # of these, how many count as available now and will not once they are taken
    restored_len: int = 0  # tokens, from the first, in host memory; beyond `cached_len` they need blocks

    def blocks_for(self, length: int, block_tokens: int) -> int:
        """How many of the available blocks it takes to hold `length` tokens."""
        return ceil_div(length, block_tokens) - self.blocks_cached + self.blocks_revived


@dataclass(frozen=True, slots=True)
class Refusal:
    """The head of the queue cannot start, for want of a slot or of KV."""

    candidate: Candidate
    reason: WaitReason
