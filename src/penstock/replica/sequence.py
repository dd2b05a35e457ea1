"""One request inside a replica."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf
from enum import Enum
from typing import TYPE_CHECKING

from penstock.core.events import PhaseTimes
from penstock.core.request import Request
from penstock.core.step import TokenLogprobs

if TYPE_CHECKING:
    from penstock.replica.lane import DecodeLane

KEY_BYTES = 16


class Phase(Enum):
    """Where the request's time goes now; the names are the fields of PhaseTimes."""

    QUEUE = "queue_s"
    PREFILL = "prefill_s"
    DECODE = "decode_s"
    PREEMPTED = "preempted_s"


class Sequence:
    """The state a replica keeps for a request.

    Of its `total_len` known tokens `computed_len` have KV. While it prefills, both are its own; when all are
    computed the next token is sampled and it joins the decode lane, where exactly one token lacks KV and
    lengths follow from the lane's clock.
    """

    __slots__ = (
        "arrival_index",
        "block_keys",
        "blocks",
        "cached_len",
        "computed",
        "finish_clock",
        "first_token_s",
        "is_keyed",
        "known_len",
        "lane",
        "last_s",
        "offset",
        "output",
        "phase",
        "phases",
        "prompt_logprobs",
        "published_blocks",
        "request",
        "running",
        "seq_id",
        "submitted_s",
    )

    def __init__(self, seq_id: int, request: Request, now_s: float) -> None:
        self.seq_id = seq_id
        self.request = request
        self.arrival_index = seq_id
        self.submitted_s = now_s
        self.output: list[int] = []  # stays empty where only lengths are known
        self.known_len = request.prompt_len
        self.computed = 0
        self.lane: DecodeLane | None = None
        self.offset = 0
        self.finish_clock = 0
        self.cached_len = 0  # of the first admission; what `usage` reports
        self.blocks: list[int] = []
        # Whether its content is known, so that others can find its blocks
        self.is_keyed = request.prompt_tokens is not None or request.block_keys is not None
        self.block_keys: list[bytes] = []  # of the leading full blocks, as far as they are needed
        self.published_blocks = 0  # leading blocks already offered to the prefix index
        self.prompt_logprobs: list[TokenLogprobs] = []  # where asked for, as far as computed
        self.running = False
        self.phase = Phase.QUEUE
        self.phases = PhaseTimes()
        self.first_token_s: float | None = None
        self.last_s = now_s

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, prompt={self.request.prompt_len}, output={self.output_len}, "
            f"computed={self.computed_len}, blocks={len(self.blocks)}, phase={self.phase.name})"
        )

    @property
    def computed_len(self) -> int:
        lane = self.lane
        return self.computed if lane is None else lane.clock + self.offset

    @property
    def total_len(self) -> int:
        lane = self.lane
        return self.known_len if lane is None else lane.clock + self.offset + 1

    @property
    def output_len(self) -> int:
        return self.total_len - self.request.prompt_len

    @property
    def output_left(self) -> int:
        return self.request.max_output_tokens - self.output_len

    @property
    def block_count(self) -> int:
        return len(self.blocks)

    @property
    def is_decoding(self) -> bool:
        return self.lane is not None

    def enter(self, phase: Phase, now_s: float) -> None:
        """Charge the time since the last change to the phase that ends."""
        assert now_s >= self.last_s, "time runs forward"
        name = self.phase.value
        setattr(self.phases, name, getattr(self.phases, name) + now_s - self.last_s)
        self.phase = phase
        self.last_s = now_s

    def tokens(self) -> list[int] | None:
        """Prompt and output, or None where only lengths are known."""
        prompt = self.request.prompt_tokens
        return None if prompt is None else [*prompt, *self.output]

    def key_blocks(self, block_count: int, block_tokens: int) -> SequenceOf[bytes]:
        """Content keys of the first `block_count` full blocks; fewer where the content is not known.

        A key hashes the block's tokens and, through its predecessor's key, everything before them; the
        chain starts from the salt. Keys are cryptographic so that nobody can craft a block that collides
        with another tenant's.
        """
        keys = self.block_keys
        if self.request.prompt_tokens is None:
            given = self.request.block_keys or ()
            return given[:block_count]
        prompt_len = self.request.prompt_len
        prompt = self.request.prompt_tokens
        previous = keys[-1] if keys else salt_key(self.request.cache_salt)
        for index in range(len(keys), block_count):
            start, stop = index * block_tokens, (index + 1) * block_tokens
            if stop <= prompt_len:
                content: SequenceOf[int] = prompt[start:stop]
            else:
                content = [
                    *prompt[start:prompt_len],
                    *self.output[max(0, start - prompt_len) : stop - prompt_len],
                ]
            previous = chain_key(previous, content)
            keys.append(previous)
        return keys[:block_count]


def salt_key(salt: str) -> bytes:
    """The root of a key chain."""
    return hashlib.blake2b(salt.encode(), digest_size=KEY_BYTES, person=b"penstock-salt").digest()


def chain_key(previous: bytes, content: SequenceOf[int]) -> bytes:
    """The key of a block that follows the one keyed `previous`."""
    return hashlib.blake2b(previous + array("q", content).tobytes(), digest_size=KEY_BYTES).digest()
