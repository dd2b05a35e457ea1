"""The soak benchmark in small: a tiny model, a few seconds, few slots and little KV, all of its checks."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.soak import LEFT, OK, Sample, growth_problems, soak_server

from penstock.core.units import MIB

# Four slots and KV for about two of the longest requests: the others queue, and some are preempted.
FLAGS = (
    "--preset",
    "sarathi",
    "--threads",
    "1",
    "--dtype",
    "float32",
    "--running-max",
    "4",
    "--kv-memory",
    "512KiB",
)


def test_nothing_is_lost_wrong_or_leaked(tiny_folder: Path, tmp_path: Path) -> None:
    soak = soak_server(str(tiny_folder), tmp_path, minutes=0.15, streams=16, tasks=24, seed=1, flags=FLAGS)
    assert soak.problems == []
    assert soak.ends.keys() == {OK, LEFT} and soak.requests >= 50
    assert soak.preemptions > 0 and soak.cached_tokens > 0, "the load was of the kind it should be"


@pytest.mark.parametrize("process", ["gateway_bytes", "engine_bytes"])
def test_growth_is_told(process: str) -> None:
    """The check bites: a leak of 3 MiB a sample is a problem, a warm-up that ends is none."""

    def samples(sizes: list[int]) -> list[Sample]:
        flat = {"gateway_bytes": 100 * MIB, "engine_bytes": 100 * MIB}
        rest = {"running": 1.0, "waiting": 0.0, "kv_frac": 0.5, "output_tokens": 1.0}
        return [
            Sample(at_s=float(at), **{**flat, process: size}, **rest)  # type: ignore[arg-type]
            for at, size in enumerate(sizes)
        ]

    leak = samples([(100 + 3 * index) * MIB for index in range(20)])
    warm_up = samples([min(100 + 9 * index, 160) * MIB for index in range(20)])
    assert [process in problem for problem in growth_problems(leak)] == [True]
    assert growth_problems(warm_up) == []
    assert growth_problems(warm_up[:5]) != [], "too few to tell"
