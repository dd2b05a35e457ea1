"""Why anything happened. Every effect carries one of these; metrics and timelines show them."""

from __future__ import annotations

from enum import StrEnum


class FinishReason(StrEnum):
    """How a request ended. STOP and LENGTH are answers; the rest are not."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"


class WaitReason(StrEnum):
    """Why a queued request has not started."""

    SLOTS = "slots"  # as many sequences run as may
    KV_CAPACITY = "kv_capacity"  # its prompt does not fit the free blocks now
    STEP_BUDGET = "step_budget"  # no room in this step's token budget
    BEHIND_HEAD = "behind_head"  # an earlier-ranked request waits, and may not be overtaken
    KV_COPY = "kv_copy"  # a copy between device and host, its own or of somebody who makes room, is under way
    LEADER = "leader"  # a sibling computes the shared prompt
    GROUP = "group"  # another member of its group computes the prefix they share


class PreemptReason(StrEnum):
    """Why a running sequence gave its KV back."""

    KV_EXHAUSTED = "kv_exhausted"  # a higher-ranked sequence needed a block
    KV_LOST = "kv_lost"  # its copy from the host failed
    OUTRANKED = "outranked"  # a higher-ranked one that waited took its place


class PinEvent(StrEnum):
    """What became of KV that a program left pinned."""

    MADE = "made"  # a turn ended, and its KV stays
    HIT = "hit"  # the program's next turn started while the pin was in force
    REPLACED = "replaced"  # a later turn of the program ended: its own pin takes over, or none
    EXPIRED = "expired"
    SACRIFICED = "sacrificed"  # somebody needed the room, and nobody else could yield
    RELEASED = "released"  # the client said that it will not return


class CancelReason(StrEnum):
    CLIENT_DISCONNECT = "client_disconnect"
    SLOW_CLIENT = "slow_client"  # it does not read what it asked for
    STOP_STRING = "stop_string"  # the gateway found the stop string: the answer is complete
    ADMIN = "admin"
    DEADLINE = "deadline"
    SHUTDOWN = "shutdown"


class ShedReason(StrEnum):
    """Why the desk refused a request that was valid."""

    QUEUE_REQUESTS = "queue_requests"
    QUEUE_TOKENS = "queue_tokens"
    QUEUE_WAIT = "queue_wait"
    TENANT_CONCURRENCY = "tenant_concurrency"
    TENANT_RATE = "tenant_rate"
    DRAINING = "draining"
    NO_ENGINE = "no_engine"


class MissReason(StrEnum):
    """Why prompt tokens were not found in the prefix cache."""

    NEW = "new"
    EVICTED = "evicted"
