"""What a client asks for, after validation, in the form every room shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.core.metrics import Slo

_EMPTY: frozenset[int] = frozenset()
ProgramKey = tuple[str, str]  # tenant, and the tenant's name for the program


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Defaults are OpenAI's; `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # how many alternatives to return beside the chosen token; None: none at all
    prompt_logprobs: bool = False  # also score the prompt's own tokens (legacy `echo` with `logprobs`)
    seed: int = 0  # the draw at output position i is a pure function of (seed, i), whatever the batch

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


_DEFAULT_SAMPLING = SamplingParams()  # immutable, so one serves all


@dataclass(frozen=True, slots=True, repr=False)
class Request:
    """One completion of one prompt. `n` choices are `n` requests that share a prompt.

    `prompt_tokens` is None where only lengths are known (the twin on a trace); then `block_keys` may
    carry content ids of the full prompt blocks, so that shared prefixes stay shared.
    """

    id: str
    prompt_len: int
    max_output_tokens: int
    arrival_s: float
    prompt_tokens: Sequence[int] | None = None
    block_keys: Sequence[bytes] | None = None
    min_output_tokens: int = 0
    stop_token_ids: frozenset[int] = _EMPTY  # these end the output with `stop`; includes EOS unless ignored
    sampling: SamplingParams = _DEFAULT_SAMPLING
    tenant: str = "default"
    slo_class: str = "default"
    priority: int = 0  # lower first, as in vLLM
    session_id: str | None = None
    cache_salt: str = ""  # prefixes are shared only between requests of equal salt
    leader_id: str | None = None  # a sibling with the same prompt that computes it for both
    # Hints: they change when something is computed, never what.
    program_id: str | None = None  # the agent's run that this call is a turn of
    is_last_turn: bool = False  # the program says that no turn follows
    tool: str | None = None  # what the program will call before its next turn
    pin_s: float | None = None  # how long to keep its KV when it ends, in seconds; None: as the policy says
    group_id: str | None = None  # requests of one batch that begin alike
    shared_len: int = 0  # prompt tokens that the group has in common
    slo: Slo | None = None  # its own targets, instead of its class's

    def __post_init__(self) -> None:
        assert self.prompt_len >= 1 and self.max_output_tokens >= 1, "the gateway refuses empty work"
        assert self.prompt_tokens is None or len(self.prompt_tokens) == self.prompt_len

    def __repr__(self) -> str:
        return (
            f"Request({self.id}, prompt_len={self.prompt_len}, max_output_tokens={self.max_output_tokens}, "
            f"tenant={self.tenant!r}, arrival_s={self.arrival_s:.6f})"
        )

    @property
    def program(self) -> ProgramKey | None:
        """The agent's run, or else the session, that it is a turn of; None: it stands alone."""
        name = self.program_id or self.session_id
        return None if name is None else (self.tenant, name)

    @property
    def total_len_max(self) -> int:
        """Tokens of KV at most: the last sampled token is never fed back."""
        return self.prompt_len + self.max_output_tokens - 1
