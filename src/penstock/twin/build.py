"""From `serve`'s settings and the name of a machine to what a simulation runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import ConfigError
from penstock.core.settings import Settings
from penstock.core.units import GIB, format_bytes, parse_bytes
from penstock.models.config import ModelConfig
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs import hardware, tables
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.profile_file import read_profile
from penstock.twin.costs.roofline import RooflineCostModel
from penstock.twin.costs.spec import ModelSpec, Parallel
from penstock.twin.replica import PathCosts

CPU_AUTO_KV_BYTES = 4 * GIB  # the most that `serve` takes on a CPU when it may choose
KV_ELEMENT_BYTES = 2
HOST_AUTO_POOLS = 2  # host memory for KV, in pools, where it is to be chosen


@dataclass(frozen=True, slots=True)
class Machine:
    """A cost model, where it comes from, and the KV tokens it has room for by itself (None: not known).

    `path` is what a request passes outside the engine's steps.
    """

    cost: CostModel
    name: str
    kv_tokens: int | None
    path: PathCosts = PathCosts()
    power_status: str = "unknown"  # how its power figures are known: measured, published or assumed


def machine_of(name_or_path: str, engine: str, config: ModelConfig, parallel: Parallel) -> Machine:
    """A profile written by `penstock calibrate` (a file), or shipped hardware with an engine's overheads.

    Raises ConfigError with the nearest names on a typo, and naming the field that a profile lacks.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file() and _kind_of(path) == tables.KIND:
        fitted = tables.load_fitted(path)
        power_status = fitted.profile.power.status
        return Machine(fitted, f"{fitted.profile.name} ({path.name})", None, power_status=power_status)
    device, engine_profile = hardware.load_hardware(name_or_path), hardware.load_engine(engine)
    roofline = RooflineCostModel(ModelSpec.of(config), device, engine_profile, parallel)
    name = f"{name_or_path} × {parallel.devices}, engine {engine}"
    overheads = PathCosts(engine_profile.request_s, 0.0, 0.0)  # that is all of its way, both directions
    return Machine(roofline, name, roofline.kv_tokens_max(), overheads, device.power.status)


def limits_of(settings: Settings, config: ModelConfig, machine: Machine) -> ReplicaLimits:
    """As `serve` would size the replica there. Raises ConfigError."""
    replica = settings.replica
    if replica.kv_memory == "auto" and machine.kv_tokens is not None:
        kv_tokens = machine.kv_tokens
    else:
        kv_tokens = _kv_bytes(replica.kv_memory) // config.kv_bytes_per_token(KV_ELEMENT_BYTES)
    if kv_tokens < replica.kv_block_tokens:
        raise ConfigError(
            f"{machine.name} has no room for KV beside the weights",
            hint="Choose larger hardware, cut the model over more devices, or set `replica.kv_memory`.",
            param="replica.kv_memory",
        )
    kv_blocks = kv_tokens // replica.kv_block_tokens
    block_bytes = replica.kv_block_tokens * config.kv_bytes_per_token(KV_ELEMENT_BYTES)
    return ReplicaLimits(
        kv_blocks=kv_blocks,
        kv_block_tokens=replica.kv_block_tokens,
        running_max=replica.running_max,
        step_tokens_max=replica.step_tokens,
        context_len_max=min(replica.context_len or config.context_len, config.context_len),
        prefix_cache=replica.prefix_cache,
        host_kv_blocks=_host_blocks(replica.host_kv_memory, kv_blocks, block_bytes),
        kv_group_tokens=replica.kv_group_tokens,
        kv_block_bytes=block_bytes,
        kv_layers=config.layers,
    )


def _host_blocks(setting: str, kv_blocks: int, block_bytes: int) -> int:
    if setting.strip() == "0":
        return 0
    if setting == "auto":
        return HOST_AUTO_POOLS * kv_blocks
    wanted = _bytes("host_kv_memory", setting)
    if wanted < block_bytes:
        raise ConfigError(
            f"`replica.host_kv_memory` asks for {format_bytes(wanted)}, and a KV block takes "
            f"{format_bytes(block_bytes)}",
            hint="Ask for more, `auto`, or 0 for none.",
            param="replica.host_kv_memory",
        )
    return wanted // block_bytes


def _kind_of(path: Path) -> str:
    import tomllib

    try:
        return str(tomllib.loads(path.read_text(encoding="utf-8")).get("kind", ""))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        read_profile(path, "hardware")  # says what is wrong with the file
        raise


def _kv_bytes(setting: str) -> int:
    if setting == "auto":
        return CPU_AUTO_KV_BYTES
    return _bytes("kv_memory", setting)


def _bytes(name: str, setting: str) -> int:
    try:
        return parse_bytes(setting)
    except ValueError as error:
        raise ConfigError(f"`replica.{name}`: {error}", param=f"replica.{name}") from None
