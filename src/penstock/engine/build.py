"""From settings and a model's files to a loaded engine: the executor, and what it can do."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from penstock import __version__
from penstock.core.errors import ConfigError, EnvironmentMissing
from penstock.core.settings import ReplicaSettings, Settings
from penstock.engine.attention import make_attention
from penstock.engine.checkpoint import open_checkpoint
from penstock.engine.executor import TorchExecutor
from penstock.engine.host_kv import HostKV
from penstock.engine.kv_store import KVStore, block_bytes
from penstock.engine.linear import LinearBackend, PlainLinearBackend
from penstock.engine.linear_cpu import CpuLinearBackend
from penstock.engine.memory import host_block_count, kv_block_count
from penstock.engine.model import DecoderModel
from penstock.engine.threads import Threads
from penstock.models.config import ModelConfig, ModelFiles
from penstock.policies.stack import check_servable, lanes_split
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaInfo

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(slots=True)
class Stages:
    """Seconds of each stage of starting, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began_s = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began_s


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model, ready for plans."""

    executor: TorchExecutor
    limits: ReplicaLimits
    info: ReplicaInfo


def build_engine(
    settings: Settings,
    source: ModelFiles,
    model_name: str,
    stages: Stages,
    threads: Threads | None = None,
) -> Engine:
    """Load everything. Raises ModelError, ConfigError or EnvironmentMissing."""
    replica = settings.replica
    device = choose_device(replica.device)
    if device.type == "cuda":
        check_servable(replace(settings, replica=replace(replica, device="cuda")))
    threads = threads or Threads(choose_threads(replica.threads), are_shared=lanes_split(settings.policies))
    with stages.timed("weights"):
        checkpoint = open_checkpoint(source)
        config = checkpoint.config
        dtype = choose_dtype(replica.dtype, device, config)
        model = DecoderModel.load(
            checkpoint, dtype=dtype, device=device, linear=_linear_backend(device, threads)
        )
    with stages.timed("kv_pool"):
        per_block = block_bytes(config, replica.kv_block_tokens, dtype)
        blocks = kv_block_count(replica.kv_memory, per_block, device)
        limits = replace(
            _limits(replica, config, blocks),
            host_kv_blocks=host_block_count(replica.host_kv_memory, per_block, blocks),
            kv_block_bytes=per_block,
        )
        model.reserve_positions(limits.context_len_max)
        store = KVStore(config, blocks, replica.kv_block_tokens, dtype, device)
        host = HostKV(store, limits.host_kv_blocks) if limits.host_kv_blocks else None
    executor = TorchExecutor(model, store, make_attention(config, store), threads, host)
    info = ReplicaInfo(
        engine="0",
        model=model_name,
        context_len_max=limits.context_len_max,
        kv_block_tokens=limits.kv_block_tokens,
        kv_blocks=blocks,
        kv_bytes=store.byte_count,
        weights_bytes=model.weight_bytes,
        running_max=limits.running_max,
        step_tokens_max=limits.step_tokens_max,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        policies=settings.policies.names(),
        fingerprint=fingerprint(settings, source.path, str(device), str(dtype)),
    )
    return Engine(executor, limits, info)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"`replica.device` is `{name}`", hint="Use `auto`, `cpu` or `cuda`.")
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMissing(
            "`replica.device` is `cuda`, but torch sees no CUDA device",
            hint="Use `cpu`, or install a CUDA build of torch and check `nvidia-smi`.",
        )
    return torch.device(name)


def choose_threads(setting: int) -> int:
    """0 takes every core this process may run on; docs/engine.md has the measurement."""
    return setting or len(os.sched_getaffinity(0))


def choose_dtype(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it, else float32 on a CPU and float16 on a GPU."""
    if name in _DTYPES:
        return _DTYPES[name]
    if name != "auto":
        raise ConfigError(f"`replica.dtype` is `{name}`", hint=f"Use `auto` or one of {', '.join(_DTYPES)}.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def _linear_backend(device: torch.device, threads: Threads) -> LinearBackend:
    return CpuLinearBackend(threads) if device.type == "cpu" else PlainLinearBackend()


def _limits(replica: ReplicaSettings, config: ModelConfig, kv_blocks: int) -> ReplicaLimits:
    context_len = min(replica.context_len or config.context_len, config.context_len)
    return ReplicaLimits(
        kv_blocks=kv_blocks,
        kv_block_tokens=replica.kv_block_tokens,
        running_max=replica.running_max,
        step_tokens_max=replica.step_tokens,
        context_len_max=context_len,
        prefix_cache=replica.prefix_cache,
        kv_group_tokens=replica.kv_group_tokens,
        kv_layers=config.layers,
    )


def fingerprint(settings: Settings, path: Path, device: str, dtype: str) -> str:
    """Names the build, the model, the arithmetic and the policy stack: what equal output depends on."""
    parts = (__version__, torch.__version__, path.name, device, dtype, *settings.policies.names().values())
    return f"penstock-{__version__}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:10]}"
