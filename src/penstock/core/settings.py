"""The resolved settings the program runs on: frozen, complete, one dataclass a section.

Every default of Penstock is here and nowhere else; `core/config.py` reads a file, the environment and flags
into these, and `penstock config show` prints them. A field's metadata carries its help and its bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from penstock.core.metrics import Slo


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A documented field; numbers outside [low, high], and text that is none of `choices`, are refused."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """`[replica]`: one engine's size and place."""

    count: int = setting(1, "replicas to start", low=1, high=1)
    device: str = setting("auto", "`auto`, `cpu` or `cuda`")
    dtype: str = setting("auto", "`auto`, `bfloat16`, `float16` or `float32`")
    threads: int = setting(0, "CPU threads of the engine; 0 takes every core it may run on", low=0, high=1024)
    kv_memory: str = setting("auto", "KV pool size, for example `2GiB`; `auto` takes a share of what is free")
    kv_block_tokens: int = setting(16, "tokens in a KV block", low=1, high=1024)
    kv_group_tokens: int = setting(
        0,
        "a sequence's KV blocks lie side by side in runs of so many tokens; 0: anywhere",
        low=0,
        high=1 << 20,
    )
    host_kv_memory: str = setting(
        "0", "host memory for KV that a `preempt` policy swaps out; `auto`: twice the pool, if it is free"
    )
    context_len: int = setting(0, "longest prompt + output served; 0 takes the model's", low=0, high=1 << 24)
    running_max: int = setting(64, "sequences that may run at once", low=1, high=4096)
    step_tokens: int = setting(512, "token budget of one step", low=1, high=1 << 20)
    prefix_cache: bool = setting(True, "reuse KV of shared prefixes")
    check_invariants_steps: int = setting(
        0, "check the replica's own books every so many steps, and die when they are wrong; 0: never", low=0
    )


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """`[policies]`: one name a slot; they override the preset."""

    rank: str = setting("fcfs", "order of waiting and running work")
    admit: str = setting("whole-prompt", "which of the ranked may start now")
    compose: str = setting("sarathi", "tokens of each sequence in the next step")
    preempt: str = setting("youngest-recompute", "victim and manner when KV runs out")
    retain: str = setting("lru", "which unused KV to drop first")
    lanes: str = setting("none", "shares of the device for prefill and decode; `none`: one step at a time")
    options: dict[str, dict[str, Any]] = setting(
        dict, "settings of single policies: a table `[policies.options.NAME]` each; JSON in the environment"
    )

    def names(self) -> dict[str, str]:
        """Slot → policy."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "options"}


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """`[tenants.NAME]`: what the operator grants one tenant."""

    weight: float = setting(1.0, "share of the service relative to other tenants", low=1e-3, high=1e6)


@dataclass(frozen=True, slots=True)
class DeskSettings:
    """`[desk]`: bounds of the queue at the door."""

    queue_requests_max: int = setting(1024, "requests that may wait at the desk", low=0, high=1 << 20)
    queue_tokens_max: int = setting(4_000_000, "prompt + output tokens that may wait", low=1)
    queue_wait_s_max: float = setting(120.0, "refuse when the expected wait is longer, seconds", low=0.1)
    tenant_requests_max: int = setting(0, "requests of one tenant inside at once; 0: no cap", low=0)
    engine_ahead: int = setting(8, "requests handed to the engine beyond its running slots", low=0, high=4096)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """`[gateway]`: the HTTP server."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 picks a free one", low=0, high=65535)
    api_keys: tuple[str, ...] = setting(
        tuple, "accepted bearer keys, comma separated in the environment; none: open"
    )
    tenant_header: str = setting(
        "x-gateway-inference-fairness-id",
        "request header that names the tenant, set by a proxy you trust; empty: everybody is `default`",
    )
    drain_timeout_s: float = setting(30.0, "how long running streams may finish after SIGTERM", low=0.0)
    stall_s: float = setting(30.0, "without an engine heartbeat for so long, /health says stuck", low=0.1)
    body_bytes_max: int = setting(8 << 20, "largest request body read", low=1024)
    bodies_bytes_max: int = setting(256 << 20, "request bodies held in memory at once", low=1024)
    body_timeout_s: float = setting(30.0, "how long a request body may take to arrive", low=0.1)
    header_bytes_max: int = setting(64 << 10, "largest request line and headers", low=1024)
    header_timeout_s: float = setting(30.0, "how long request headers may take to arrive", low=0.1)
    write_stall_s: float = setting(60.0, "close a connection whose client reads nothing for so long", low=0.1)
    choices_max: int = setting(16, "largest `n`", low=1, high=128)
    stream_buffer_tokens_max: int = setting(
        16384, "tokens buffered for a client that does not read before its request is cancelled", low=16
    )
    keepalive_s: float = setting(15.0, "comment line on a silent stream every so often", low=0.1)
    strict_fields: bool = setting(False, "answer 400 to unknown request fields")


@dataclass(frozen=True, slots=True)
class RecordSettings:
    """`[record]`: files that `serve` writes about its own work; empty: none. docs/formats.md has them."""

    requests: str = setting("", "request log to write: lengths, times and hashed prefixes; no text")
    steps: str = setting("", "step trace to write: what each engine step computed, and its time")
    journal: str = setting("", "decision journal to write, for debugging: every call of the replica")


@dataclass(frozen=True, slots=True)
class TwinSettings:
    """`[twin]`: how a running server watches its own model of itself."""

    profile: str = setting("", "profile of `penstock calibrate` that the server compares its steps with")
    overlap: str = setting(
        "none",
        "simulated: what runs beside what: `none`; `host`, the next step is formed while this one runs; "
        "`nano`, kernels of one layer as well (NanoFlow)",
    )
    host_link_gb_per_s: float = setting(
        32.0, "simulated: bandwidth between device and host, 10^9 bytes/s; PCIe 4 x16", low=1e-3, high=1e4
    )
    host_launch_us: float = setting(
        10.0, "simulated: time to begin a transfer between device and host", low=0.0, high=1e6
    )


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """`[batch]`: files of requests that are run in the background."""

    folder: str = setting("", "where files and batches are kept; empty: no `/v1/files` and no `/v1/batches`")
    file_bytes_max: int = setting(64 << 20, "largest file that may be uploaded", low=1024)
    folder_bytes_max: int = setting(4 << 30, "bytes of files kept at once, results included", low=1024)
    files_max: int = setting(1000, "files kept at once, results not counted", low=1, high=1 << 20)
    batches_max: int = setting(1000, "batches kept at once, ended ones included", low=1, high=1 << 20)
    requests_max: int = setting(50_000, "requests in one batch", low=1, high=1 << 20)
    in_flight_max: int = setting(16, "requests of batches at the engine at once", low=1, high=1 << 16)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything `serve` runs on."""

    model: str = setting(
        "smollm2-135m-instruct", "catalogue name, local folder, .gguf file, or hf:owner/name"
    )
    served_model_name: str = setting("", "name in the API; empty: the catalogue or file name")
    preset: str = setting("", "a named policy stack, see `penstock policies`; empty: `penstock`")
    policies: PolicySettings = field(default_factory=PolicySettings)
    replica: ReplicaSettings = field(default_factory=ReplicaSettings)
    desk: DeskSettings = field(default_factory=DeskSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    record: RecordSettings = field(default_factory=RecordSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    twin: TwinSettings = field(default_factory=TwinSettings)
    slo: dict[str, Slo] = field(default_factory=dict)
    seed: int = setting(0, "of every policy that draws at random", low=0, high=1 << 62)
    tenants: dict[str, TenantSettings] = field(default_factory=dict)
