"""Faults in a system with two lanes: whatever ends, comes or breaks while the other lane computes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from penstock.core.errors import ConfigError
from penstock.policies.stack import REGISTRIES, conflict_in, lanes_split
from penstock.replica.laned import LanedReplica
from penstock.twin.vopr import draw_script
from penstock.twin.vopr.run import RunResult, run_checked
from penstock.twin.vopr.script import Script
from penstock.twin.vopr.script_file import parse_script, script_json

SEEDS = range(1, 161)


def laned(seed: int) -> Script | None:
    """The seed's script with lanes; None where its policies do not go with them."""
    script, draw = draw_script(seed), random.Random(f"{seed}/lanes")
    names = [name for name in REGISTRIES["lanes"].names() if name != "none"]
    system = replace(
        script.system,
        lanes=draw.choice(names),
        admit=draw.choice(["aggressive", "whole-prompt"]),
        running_max=draw.randint(2, 8),
        kv_lost_blocks=script.system.kv_blocks // 2,
        exact=True,
        host_kv_blocks=0,
        kv_group_tokens=0,
        retain="lru",
    )
    return None if conflict_in(system.policies.names()) else replace(script, system=system)


def run(seed: int) -> RunResult | None:
    script = laned(seed)
    return None if script is None else run_checked(script, thoroughly=seed % 8 == 0)


def test_nothing_goes_wrong() -> None:
    results = {seed: result for seed in SEEDS if (result := run(seed)) is not None}
    failed = {seed: result.failure for seed, result in results.items() if not result.is_ok}
    assert failed == {}
    assert len(results) > len(SEEDS) / 2
    assert sum(result.steps for result in results.values()) > 2000
    assert sum(result.preemptions for result in results.values()) > 20
    assert sum(result.restarts for result in results.values()) > 20


@pytest.mark.pure
def test_blocks_that_are_given_away_too_early_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanedReplica, "_computing", lambda self, sequence: None)
    failed = [result for seed in SEEDS if (result := run(seed)) is not None and not result.is_ok]
    assert failed, "somebody reads or writes what is another's"


def test_a_script_with_lanes_is_read_back() -> None:
    script = next(found for seed in SEEDS if (found := laned(seed)) is not None)
    assert lanes_split(script.system.policies)
    assert parse_script(script_json(script)) == script
    for field, value in (("exact", False), ("host_kv_blocks", 4)):
        wrong = replace(script, system=replace(script.system, **{field: value}))
        with pytest.raises(ConfigError, match=field):
            parse_script(script_json(wrong))


def test_some_drawn_systems_have_lanes() -> None:
    found = [draw_script(seed).system for seed in range(400)]
    with_lanes = [system for system in found if system.lanes != "none"]
    assert 10 < len(with_lanes) < 120
    assert all(system.exact and not system.host_kv_blocks for system in with_lanes)
