"""What a replica tells the world. Times are the clock that was handed to the replica."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.reasons import FinishReason, PreemptReason
from penstock.core.step import TokenLogprobs


@dataclass(slots=True)
class PhaseTimes:
    """Where a request's life inside the replica went. The four add up to its time in the replica.

    queue: submitted → first admitted. prefill: admitted → first token. decode: first token → finish, less
    preempted. preempted: preempted → readmitted, summed (also when it happens before the first token).
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preempted_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.decode_s + self.preempted_s


@dataclass(slots=True)
class Admitted:
    """A request got a slot and KV. `cached_len` prompt tokens came from the prefix index."""

    request_id: str
    at_s: float
    cached_len: int
    resumed: bool = False  # after a preemption


@dataclass(slots=True)
class TokenOut:
    """One output token. A stop token (EOS) is not told, only counted by `Finished`."""

    request_id: str
    at_s: float
    token_id: int
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token only


@dataclass(slots=True)
class Preempted:
    """A running request gave its KV back; `tokens_lost` of KV must be computed again, or found as prefix."""

    request_id: str
    at_s: float
    reason: PreemptReason
    tokens_lost: int
    for_request_id: str | None = None  # who needed the blocks


@dataclass(slots=True)
class Finished:
    """The one last event of a request."""

    request_id: str
    at_s: float
    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    phases: PhaseTimes = field(default_factory=PhaseTimes)
    stop_token_id: int | None = None
    detail: str | None = None  # a cancel reason, or what failed
    first_token_s: float | None = None


ReplicaEvent = Admitted | TokenOut | Preempted | Finished
