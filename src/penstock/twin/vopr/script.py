"""What a run is made of, as plain data: the system, the calls, the faults. Times are virtual seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from penstock.core.reasons import CancelReason
from penstock.core.settings import PolicySettings, setting


class FaultKind(StrEnum):
    """What may go wrong."""

    STALL = "stall"  # the next step takes `seconds` more; the heartbeat stands still meanwhile
    SLOW = "slow"  # for `seconds` every step takes `factor` times as long; 0: the clock stands still
    CRASH = "crash"  # the next step raises before it has computed anything
    CRASH_AFTER = "crash-after"  # the next step raises after it has computed everything
    MEMORY = "memory"  # the next step cannot allocate
    COPY = "copy"  # the next copy of KV beside the steps fails
    KILL = "kill"  # the engine's process is gone
    JUMP = "jump"  # the clock jumps `seconds` forward, as after a suspended machine
    CANCEL = "cancel"  # the client of call `target` leaves, for `reason`
    STRAY_CANCEL = "stray-cancel"  # request `target` is cancelled in the engine behind the gateway's back
    DRAIN = "drain"  # the server shuts down, and cuts what is left after `seconds`


@dataclass(frozen=True, slots=True)
class System:
    """The sizes, policies and bounds of the system under test."""

    exact: bool = setting(True, "tokens and strict KV; else lengths only, on the twin's executor")
    kv_blocks: int = setting(16, "KV blocks that the desk believes in", low=1, high=4096)
    kv_lost_blocks: int = setting(0, "of these, missing in the engine from the start", low=0, high=4095)
    block_tokens: int = setting(4, "tokens in a KV block", low=1, high=1024)
    running_max: int = setting(4, "sequences that may run at once", low=1, high=256)
    step_tokens: int = setting(16, "token budget of a step", low=1, high=65536)
    context_len: int = setting(64, "tokens of prompt and output", low=2, high=8192)
    prefix_cache: bool = setting(True, "reuse KV of shared prefixes")
    repeat: bool = setting(True, "let decode plans stand")
    mid_step: bool = setting(False, "the engine hears commands while a step runs")
    rank: str = "fcfs"
    admit: str = "whole-prompt"
    compose: str = "sarathi"
    preempt: str = "youngest-recompute"
    retain: str = "lru"
    lanes: str = "none"
    host_kv_blocks: int = setting(0, "KV blocks in host memory, for policies that swap", low=0, high=65536)
    kv_group_tokens: int = setting(0, "as `replica.kv_group_tokens`", low=0, high=65536)
    copy_block_s: float = setting(0.001, "how long a block is copied, with lengths only", low=0.0, high=10.0)
    queue_requests_max: int = setting(1024, "as `desk.queue_requests_max`", low=0, high=65536)
    queue_tokens_max: int = setting(1 << 20, "as `desk.queue_tokens_max`", low=1, high=1 << 30)
    queue_wait_s_max: float = setting(120.0, "as `desk.queue_wait_s_max`", low=0.1, high=1e6)
    tenant_requests_max: int = setting(0, "as `desk.tenant_requests_max`", low=0, high=65536)
    engine_ahead: int = setting(2, "as `desk.engine_ahead`", low=0, high=1024)
    stall_s: float = setting(30.0, "as `gateway.stall_s`", low=0.1, high=1e6)
    step_base_s: float = setting(0.01, "fixed cost of a step", low=1e-6, high=10.0)
    step_token_s: float = setting(0.0005, "cost of a token of a step", low=0.0, high=1.0)
    link_s: float = setting(0.001, "how long a message travels", low=0.0, high=10.0)
    link_jitter_s: float = setting(0.0, "and at most so much longer; order is kept", low=0.0, high=10.0)

    @property
    def policies(self) -> PolicySettings:
        slots = (self.rank, self.admit, self.compose, self.preempt, self.retain, self.lanes)
        return PolicySettings(*slots)

    @property
    def engine_blocks(self) -> int:
        """KV blocks that are really there."""
        return max(1, self.kv_blocks - self.kv_lost_blocks)


@dataclass(frozen=True, slots=True)
class Call:
    """One client's call: `choices` completions of one prompt.

    The prompt's first `stem_tokens` tokens are those of stem number `stem`, the rest is the call's own.
    """

    name: str
    at_s: float = setting(0.0, "when it arrives", low=0.0, high=1e6)
    choices: int = setting(1, "as `n`", low=1, high=64)
    prompt_tokens: int = setting(1, "length of the prompt", low=1, high=16384)
    output_tokens: int = setting(1, "as `max_tokens`; 0: not said", low=0, high=16384)
    stops_after_tokens: int = setting(0, "the output ends by itself here; 0: never", low=0, high=16384)
    content: int = setting(0, "number of its own content", low=0, high=1 << 30)
    stem: int = setting(0, "number of the shared content", low=0, high=1 << 30)
    stem_tokens: int = setting(0, "tokens of shared content", low=0, high=16384)
    keyed: bool = setting(True, "with lengths only: whether the prompt's block keys are known")
    salt: str = ""
    tenant: str = "default"
    session: str = ""
    slo_class: str = "default"
    group_tokens: int = setting(
        0, "said to be shared by the calls of its stem; 0: no group", low=0, high=16384
    )
    last_turn: bool = setting(False, "its session says that no turn follows")
    tool: str = ""
    pin_s: float = setting(0.0, "how long to keep its session's KV; 0: as the policy says", low=0.0, high=1e6)
    priority: int = setting(0, "lower first", low=-1000, high=1000)
    deadline_s: float = setting(0.0, "the client's patience from arrival; 0: endless", low=0.0, high=1e6)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: FaultKind
    at_s: float = setting(0.0, "when", low=0.0, high=1e6)
    seconds: float = setting(0.0, "how long, where the kind has a length", low=0.0, high=1e6)
    factor: float = setting(1.0, "of `slow`", low=0.0, high=1e4)
    target: str = ""
    reason: CancelReason = CancelReason.CLIENT_DISCONNECT


@dataclass(frozen=True, slots=True)
class Script:
    """Everything that a run depends on. `seed` is where it came from, and seeds the pipes' jitter."""

    seed: int = setting(0, "the number it was drawn from", low=0, high=(1 << 63) - 1)
    system: System = field(default_factory=System)
    calls: tuple[Call, ...] = ()
    faults: tuple[Fault, ...] = ()

    @property
    def tokens(self) -> int:
        """Of all prompts and outputs; where no `max_tokens` is said, what the context can hold."""
        context_len = self.system.context_len
        return sum(c.choices * (c.prompt_tokens + (c.output_tokens or context_len)) for c in self.calls)

    @property
    def calm_s(self) -> float:
        """From here on nothing new arrives and nothing breaks."""
        ends = [call.at_s for call in self.calls]
        ends += [fault.at_s + fault.seconds for fault in self.faults]
        return max(ends, default=0.0)
