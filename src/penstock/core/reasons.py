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
    LEADER = "leader"  # a sibling computes the shared prompt


class PreemptReason(StrEnum):
    """Why a running sequence gave its KV back."""

    KV_EXHAUSTED = "kv_exhausted"  # a higher-ranked sequence needed a block
    OUTRANKED = "outranked"  # a higher-ranked one that waited took its place


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
