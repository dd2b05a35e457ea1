"""The sizes of a simulated replica: as `serve` would choose them, or a refusal that names the setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.errors import ConfigError
from penstock.core.settings import Settings
from penstock.models.catalogue import resolve_config
from penstock.replica.limits import ReplicaLimits
from penstock.twin.build import HOST_AUTO_POOLS, limits_of, machine_of
from penstock.twin.costs.spec import Parallel

CONFIG = resolve_config(str(Path(__file__).parents[2] / "benchmarks" / "models" / "llama-3-8b"))
BLOCK_BYTES = 16 * 131_072


def limits(**changes: object) -> ReplicaLimits:
    settings = Settings()
    replica = replace(settings.replica, **changes)  # type: ignore[arg-type]
    machine = machine_of("a100-80g", "vllm-2025", CONFIG, Parallel())
    return limits_of(replace(settings, replica=replica), CONFIG, machine)


def test_host_memory_is_counted_in_blocks() -> None:
    assert limits(host_kv_memory="0").host_kv_blocks == 0
    assert limits(host_kv_memory="3MiB").host_kv_blocks == 1
    auto = limits(host_kv_memory="auto", kv_memory="1GiB")
    assert auto.kv_block_bytes == BLOCK_BYTES and auto.kv_blocks == 512
    assert auto.host_kv_blocks == HOST_AUTO_POOLS * 512


def test_memory_for_less_than_a_block_is_refused() -> None:
    """As `serve` refuses it; a simulation without host memory would be of another system."""
    with pytest.raises(ConfigError, match=r"1\.0 MiB, and a KV block takes 2\.0 MiB") as refused:
        limits(host_kv_memory="1MiB")
    assert refused.value.param == "replica.host_kv_memory" and refused.value.hint
    with pytest.raises(ConfigError) as refused:
        limits(kv_memory="1MiB")
    assert refused.value.param == "replica.kv_memory"


def test_a_size_that_is_none_names_its_setting() -> None:
    for name in ("kv_memory", "host_kv_memory"):
        with pytest.raises(ConfigError) as refused:
            limits(**{name: "much"})
        assert refused.value.param == f"replica.{name}"
