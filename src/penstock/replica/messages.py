"""What crosses the border between a replica's host and whoever dispatches to it.

The same messages travel over a pipe to an engine process, and directly in the twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from penstock.core.events import ReplicaEvent
from penstock.core.reasons import CancelReason
from penstock.core.request import ProgramKey, Request
from penstock.core.step import Direction
from penstock.core.step_trace import StepRecord


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What a replica can do; fixed once it is ready."""

    engine: str  # label in metrics, for example "0"
    model: str
    context_len_max: int
    kv_block_tokens: int
    kv_blocks: int
    kv_bytes: int
    weights_bytes: int
    running_max: int
    step_tokens_max: int
    device: str
    dtype: str
    policies: dict[str, str]
    startup_s: dict[str, float] = field(default_factory=dict)  # stage → seconds
    fingerprint: str = "penstock"


def _by_way() -> dict[str, int]:
    return {way.value: 0 for way in Direction}


@dataclass(slots=True)
class ReplicaStats:
    """A snapshot after a step. Counts ending in `_total` only grow."""

    step_index: int = 0
    running: int = 0
    waiting: int = 0
    waiting_by_reason: dict[str, int] = field(default_factory=dict)
    waiting_tokens: int = 0
    kv_blocks_used: int = 0  # held by live sequences or pins
    kv_blocks_pinned: int = 0  # of these, held by pins, some perhaps by sequences too
    kv_blocks_cached: int = 0  # evictable, but still a possible prefix hit
    kv_blocks_free: int = 0
    prefix_query_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    prefix_miss_tokens_total: dict[str, int] = field(default_factory=dict)
    preemptions_total: int = 0
    preempted_tokens_total: dict[str, int] = field(default_factory=dict)
    pins: int = 0  # in force
    pins_total: dict[str, int] = field(default_factory=dict)  # by what happened to them
    host_kv_blocks_used: int = 0
    swaps_total: dict[str, int] = field(default_factory=_by_way)  # sequences copied, by way: out, in
    swap_copies_total: dict[str, int] = field(default_factory=_by_way)  # runs of blocks, each copied at once
    swap_blocks_total: dict[str, int] = field(default_factory=_by_way)
    swap_bytes_total: dict[str, int] = field(default_factory=_by_way)  # 0 where a block's size is not known
    swap_failures_total: int = 0
    swap_stall_s_total: float = 0.0  # steps waited for copies
    step_tokens: int = 0
    step_s: float = 0.0
    schedule_s: float = 0.0  # the part of the step spent deciding


@dataclass(slots=True)
class StepReport:
    """One step's events and the state after it, in one message."""

    events: list[ReplicaEvent]
    stats: ReplicaStats
    record: StepRecord | None = None  # what the step computed, where the gateway compares it with a profile


@dataclass(frozen=True, slots=True)
class ReplicaDied:
    """The replica's host is gone; everything it held is lost and must be answered as failed."""

    detail: str


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """The answer in progress calls this tool: the model has written its name."""

    request_id: str
    tool: str


@dataclass(frozen=True, slots=True)
class ProgramLeft:
    """No turn of the program will follow: what it left pinned can go."""

    program: ProgramKey


Advice = ToolCalled | ProgramLeft  # what may help a policy, and changes no answer


class ReplicaLink(Protocol):
    """A handle on one replica. Calls never block and may come from any thread.

    `info` is available once `wait_ready` has returned. `heartbeat` grows while the replica's loop turns,
    idle or busy; it stands still when the engine is stuck inside a step.
    """

    @property
    def info(self) -> ReplicaInfo: ...

    def on_report(self, callback: Callable[[StepReport | ReplicaDied], None]) -> None:
        """Deliver every report, from a thread of the link's own. Set once, before the first submit."""

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: str, reason: CancelReason) -> None:
        """The request ends with `Finished(CANCELLED)`, or `STOP` for a stop string, within one step."""

    def advise(self, advice: Advice) -> None:
        """Heard in the order of `submit`; what it is about may be gone by then."""

    def heartbeat(self) -> int: ...

    def is_alive(self) -> bool: ...

    def close(self, timeout_s: float) -> None: ...
