"""Sizing an engine: what a wrong setting gets, and that memory is what was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_llama

from penstock.core.errors import ConfigError, EnvironmentMissing
from penstock.core.settings import Settings
from penstock.engine import memory
from penstock.engine.build import Stages, build_engine, choose_device, choose_dtype
from penstock.engine.memory import kv_block_count
from penstock.models.config import load_config

CPU = torch.device("cpu")


def with_replica(**changes: object) -> Settings:
    base = Settings()
    return replace(base, replica=replace(base.replica, **changes))  # type: ignore[arg-type]


def test_the_pool_is_as_large_as_configured(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path)
    engine = build_engine(with_replica(kv_memory="8MiB", dtype="float32"), source, "tiny", Stages())  # type: ignore[arg-type]
    assert 0.98 * (8 << 20) <= engine.info.kv_bytes <= 8 << 20
    assert engine.info.kv_bytes == engine.limits.kv_blocks * memory_of_a_block(source)
    assert engine.info.context_len_max == 1024


def memory_of_a_block(source: object) -> int:
    return load_config(source).kv_bytes_per_token(4) * 16  # type: ignore[arg-type]


def test_the_context_is_the_smaller_of_the_models_and_the_settings(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path)
    for asked, served in ((0, 1024), (100, 100), (5000, 1024)):
        engine = build_engine(with_replica(kv_memory="8MiB", context_len=asked), source, "tiny", Stages())  # type: ignore[arg-type]
        assert engine.info.context_len_max == served


def test_auto_takes_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 30)
    assert kv_block_count("auto", 1 << 20, CPU) == 256
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 40)
    assert kv_block_count("auto", 1 << 20, CPU) == 4096


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("2TiB", "not a size"),
        ("lots", "not a size"),
        ("-1GiB", "not a size"),
        ("512GiB", "are available"),
        ("1KiB", "one KV block|a KV block"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    setting: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 30)
    with pytest.raises(ConfigError, match=message):
        kv_block_count(setting, 1 << 20, CPU)


def test_wrong_names_are_usage_errors_and_missing_hardware_is_not(tmp_path: Path) -> None:
    config = load_config(write_tiny_llama(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"replica.device.*gpu"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match=r"replica.dtype.*fp8"):
        choose_dtype("fp8", CPU, config)
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentMissing, match="no CUDA device"):
            choose_device("cuda")
