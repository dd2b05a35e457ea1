"""How much memory there is, and how much of it the KV pool gets."""

from __future__ import annotations

from pathlib import Path

import torch

from penstock.core.errors import ConfigError
from penstock.core.units import GIB, format_bytes, parse_bytes

CPU_SHARE = 0.25  # of what is available when the weights are in place; a laptop does other things too
CPU_AUTO_MAX_BYTES = 4 * GIB
CUDA_SHARE = 0.85
HOST_AUTO_POOLS = 2  # host memory for KV, in pools, where it is to be chosen


def available_bytes(device: torch.device) -> int:
    """Memory that can be taken now, on the device or in the container this process lives in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _meminfo_available_bytes()
    limit = _cgroup_left_bytes()
    return available if limit is None else min(available, limit)


def kv_block_count(setting: str, block_bytes: int, device: torch.device) -> int:
    """Blocks of the pool, for `replica.kv_memory`: a size, or `auto`. Raises ConfigError."""
    available = available_bytes(device)
    if setting == "auto":
        share = CUDA_SHARE if device.type == "cuda" else CPU_SHARE
        wanted = int(available * share)
        wanted = wanted if device.type == "cuda" else min(wanted, CPU_AUTO_MAX_BYTES)
    else:
        wanted = _parse_setting(setting)
    if wanted > available:
        raise ConfigError(
            f"`replica.kv_memory` asks for {format_bytes(wanted)}; {format_bytes(available)} are available",
            hint="Ask for less, or leave it at `auto`.",
            param="replica.kv_memory",
        )
    if wanted < block_bytes:
        raise ConfigError(
            f"`replica.kv_memory` gives {format_bytes(wanted)}; a KV block takes {format_bytes(block_bytes)}",
            hint="Ask for more, or lower `replica.kv_block_tokens`.",
            param="replica.kv_memory",
        )
    return wanted // block_bytes


def host_block_count(setting: str, block_bytes: int, kv_blocks: int) -> int:
    """Blocks in host memory, for `replica.host_kv_memory`: a size, `auto` or 0. Raises ConfigError."""
    if setting.strip() == "0":
        return 0
    available = available_bytes(torch.device("cpu"))
    if setting == "auto":
        return min(HOST_AUTO_POOLS * kv_blocks, int(available * CPU_SHARE) // block_bytes)
    wanted = _parse_setting(setting, "replica.host_kv_memory")
    if not block_bytes <= wanted <= available:
        raise ConfigError(
            f"`replica.host_kv_memory` asks for {format_bytes(wanted)}; {format_bytes(available)} are "
            f"available, and a KV block takes {format_bytes(block_bytes)}",
            hint="Ask for a size between the two, `auto`, or 0 for none.",
            param="replica.host_kv_memory",
        )
    return wanted // block_bytes


def _parse_setting(setting: str, name: str = "replica.kv_memory") -> int:
    try:
        return parse_bytes(setting)
    except ValueError as error:
        raise ConfigError(f"`{name}`: {error}", param=name) from None


def _meminfo_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("The available memory cannot be read here", hint="Set `replica.kv_memory`.")


def _cgroup_left_bytes() -> int | None:
    """What the container's memory limit leaves; None without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        current = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - current)
