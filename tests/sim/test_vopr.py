"""The fault simulation itself: it passes on a fixed set of seeds, repeats itself, and explains a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.core.errors import ConfigError
from penstock.core.reasons import FinishReason
from penstock.replica.lane import DecodeLane
from penstock.replica.replica import Replica
from penstock.twin.vopr import Call, Fault, Script, System, draw_script, run_checked, run_script, shrink
from penstock.twin.vopr.script import FaultKind
from penstock.twin.vopr.script_file import (
    SCRIPT_BYTES_MAX,
    parse_script,
    read_script,
    script_json,
    write_script,
)

SEEDS = range(600)
THOROUGH = 5  # one seed in so many also runs twice, and without leaps


@pytest.mark.parametrize("part", range(4))
def test_a_fixed_set_of_seeds_passes(part: int) -> None:
    for seed in SEEDS[part::4]:
        result = run_checked(draw_script(seed), thoroughly=seed % THOROUGH == 0)
        assert result.is_ok, (seed, result.failure)


def test_the_seeds_cover_what_they_should() -> None:
    """A mix in which nothing ever finishes, or nothing ever breaks, would prove little."""
    kinds, ends, modes, preempted = Counter[FaultKind](), Counter[str](), Counter[bool](), 0
    calls: list[Call] = []
    for seed in range(600):
        script = draw_script(seed)
        calls += script.calls
        kinds.update(fault.kind for fault in script.faults)
        modes[script.system.exact] += 1
        result = run_script(script)
        ends.update(result.ends)
        preempted += result.preemptions
    assert kinds.keys() == set(FaultKind)
    assert min(modes.values()) > 50 and preempted > 50
    for hint in ("session", "group_tokens", "last_turn", "tool", "pin_s"):
        assert sum(bool(getattr(call, hint)) for call in calls) > len(calls) / 50, hint
    total = sum(ends.values())
    assert all(ends[reason.value] > total / 50 for reason in FinishReason), ends
    assert ends["stop"] + ends["length"] > total / 3, ends


def test_a_seed_draws_the_same_script_always() -> None:
    assert draw_script(11) == draw_script(11) != draw_script(12)


def test_one_stream_does_not_shift_another() -> None:
    """The load is drawn from a stream of its own: the faults do not know the number of its draws."""
    from penstock.twin.vopr.draw import stream

    assert stream(5, "load").random() == stream(5, "load").random() != stream(5, "faults").random()


CODE = """
from penstock.twin.vopr import draw_script, run_script
print([run_script(draw_script(seed)).digest for seed in range(60)])
"""


def test_the_same_digests_in_every_process() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", CODE],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
    assert str(run_script(draw_script(0)).digest) in digests.pop()


# ---- single faults, by hand -------------------------------------------------------------------------------


def one_call(*faults: Fault, output_tokens: int = 20, **fields: Any) -> Script:
    system = System(step_token_s=0.0, link_s=0.0, kv_blocks=32, **fields)
    return Script(0, system, (Call("c0", 0.0, 1, 10, output_tokens),), faults)


def ends_of(script: Script) -> dict[str, int]:
    result = run_checked(script, thoroughly=True)
    assert result.is_ok, result.failure
    return {reason: count for reason, count in result.ends.items() if count}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("kind", "end"),
    [
        (FaultKind.STALL, "length"),
        (FaultKind.SLOW, "length"),
        (FaultKind.JUMP, "length"),
        (FaultKind.CRASH, "failed"),
        (FaultKind.CRASH_AFTER, "failed"),
        (FaultKind.MEMORY, "failed"),
        (FaultKind.KILL, "failed"),
        (FaultKind.CANCEL, "cancelled"),
        (FaultKind.STRAY_CANCEL, "cancelled"),
        (FaultKind.DRAIN, "cancelled"),
    ],
)
def test_each_fault_does_what_it_says(kind: FaultKind, end: str, exact: bool) -> None:
    target = "c0.0" if kind is FaultKind.STRAY_CANCEL else "c0"
    fault = Fault(kind, 0.05, seconds=0.05, factor=3.0, target=target)
    assert ends_of(one_call(fault, exact=exact)) == {end: 1}


def test_three_failed_steps_in_a_row_end_the_engine() -> None:
    """Two may fail: each costs the requests inside, and the next one finds a fresh replica."""
    calls = tuple(Call(f"c{i}", 0.1 * i, 1, 4, 3) for i in range(5))
    for crashes, ends in ((2, {"length": 3, "failed": 2}), (3, {"failed": 3, "refused": 2})):
        faults = tuple(Fault(FaultKind.CRASH, 0.1 * i) for i in range(crashes))
        script = Script(0, System(link_s=0.0), calls, faults)
        assert ends_of(script) == ends


def test_a_stuck_engine_takes_no_new_calls() -> None:
    calls = (Call("c0", 0.0, 1, 4, 3), Call("late", 3.0, 1, 4, 3))
    script = Script(0, System(stall_s=1.0), calls, (Fault(FaultKind.STALL, 0.0, seconds=10.0),))
    assert ends_of(script) == {"length": 1, "refused": 1}


def test_blocks_that_are_missing_in_the_engine_are_a_refusal_there() -> None:
    assert ends_of(one_call(kv_lost_blocks=30)) == {"refused": 1}


def test_passing_a_sibling_whose_leader_is_cancelled_within_the_step_is_fair() -> None:
    calls = (
        Call("pair", 0.0, 2, 4, 2),
        Call("other", 0.0, 1, 4, 2, content=1),
    )
    leaves = Fault(FaultKind.STRAY_CANCEL, 0.005, target="pair.0")
    script = Script(0, System(running_max=2, mid_step=True, link_s=0.0), calls, (leaves,))
    assert ends_of(script) == {"length": 1, "cancelled": 2}


# ---- shrinking and scripts --------------------------------------------------------------------------------


def spoil(patch: pytest.MonkeyPatch) -> None:
    steps = DecodeLane.steps_to_finish
    patch.setattr(DecodeLane, "steps_to_finish", lambda self: steps(self) + 1)


def failing_seed() -> int:
    for seed in range(200):
        script = draw_script(seed)
        if len(script.calls) > 5 and script.faults and run_script(script).failure is not None:
            return seed
    raise AssertionError("the mutant survives")


@pytest.mark.pure
def test_a_failure_shrinks_to_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    script = draw_script(failing_seed())
    failure = run_script(script).failure
    assert failure is not None and failure.check == "repeat" and failure.last_lines
    short = shrink(script, failure.check, thoroughly=False)
    assert len(short.calls) == 1 and not short.faults
    assert short.calls[0].prompt_tokens == 1 and short.calls[0].output_tokens <= 3
    assert short.system.policies == System().policies != script.system.policies
    again = run_script(short).failure
    assert again is not None and again.check == "repeat"
    assert shrink(script, failure.check, thoroughly=False) == short


@pytest.mark.pure
def test_the_command_shrinks_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, runner = tmp_path / "failed.json", CliRunner()
    with monkeypatch.context() as patch:
        spoil(patch)
        seed = failing_seed()
        failed = runner.invoke(app, ["vopr", str(seed), "--out", str(path)])
        assert failed.exit_code == 1
        assert failed.stdout.startswith(f"seed: {seed}\n") and "FAILED with seed" in failed.stdout
        assert f"penstock vopr --script {path}" in failed.stdout
        replayed = runner.invoke(app, ["vopr", "--script", str(path), "--json"])
        found = json.loads(replayed.stdout)
        assert replayed.exit_code == 1 and found["check"] == "repeat" and not found["ok"]
    assert len(read_script(path).calls) == 1
    mended = runner.invoke(app, ["vopr", "--script", str(path)])
    assert mended.exit_code == 0 and "\nok: " in mended.stdout


@pytest.mark.pure
def test_many_seeds_stop_at_the_first_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, path = CliRunner(), tmp_path / "failed.json"
    ok = runner.invoke(app, ["vopr", "3", "--runs", "12", "--json"])
    assert ok.exit_code == 0 and json.loads(ok.stdout)["runs"] == 12
    lines = runner.invoke(app, ["vopr", "3", "--runs", "12"]).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [*(f"seed {seed}" for seed in range(3, 15)), "ok"]
    monkeypatch.setattr(Replica, "stats", lambda self: (_ for _ in ()).throw(ValueError("spoilt")))
    failed = runner.invoke(app, ["vopr", "3", "--until-failure", "--json", "--out", str(path)])
    found = json.loads(failed.stdout)
    assert failed.exit_code == 1 and found["message"] == "spoilt" and found["check"].startswith("ValueError")


def test_a_time_limit_ends_the_hunt() -> None:
    done = CliRunner().invoke(app, ["vopr", "1", "--until-failure", "--time-limit-s", "0.2", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["runs"] >= 1


@pytest.mark.parametrize("arguments", [[], ["7", "--script", "x.json"]])
def test_a_seed_or_a_script(arguments: list[str]) -> None:
    found = CliRunner().invoke(app, ["vopr", *arguments])
    assert isinstance(found.exception, ConfigError) and "SEED" in found.exception.message


@given(st.integers(0, 2_000))
@settings(max_examples=60, deadline=None)
def test_a_script_survives_its_file(seed: int) -> None:
    script = draw_script(seed)
    assert parse_script(json.loads(json.dumps(script_json(script)))) == script


GOOD = script_json(Script(1, System(), (Call("a", 0.0, 1, 3, 2),), (Fault(FaultKind.STALL, 1.0),)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "other"}, "kind"),
        ({"version": 2}, "kind"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"extra": 1}, "extra"),
        ({"system": {"kv_blocks": 1 << 40}}, "system.kv_blocks"),
        ({"system": {"kv_blocks": "many"}}, "system.kv_blocks"),
        ({"system": {"step_base_s": float("nan")}}, "system.step_base_s"),
        ({"system": {"rank": "fcsf"}}, "policies.rank"),
        ({"system": []}, "system"),
        ({"calls": {}}, "calls"),
        ({"calls": [{}]}, "calls[0].name"),
        ({"calls": [{"name": "a"}, {"name": "a"}]}, "calls"),
        ({"calls": [{"name": "a" * 100}]}, "calls[0].name"),
        ({"calls": [{"name": "a", "prompt_tokens": 1 << 30}]}, "calls[0].prompt_tokens"),
        ({"calls": [{"name": "a"}] * 5000}, "calls"),
        ({"calls": [{"name": str(i), "prompt_tokens": 16384} for i in range(100)]}, "calls"),
        ({"faults": [{"kind": "boom"}]}, "faults[0].kind"),
        ({"faults": [{"kind": "jump", "seconds": -1}]}, "faults[0].seconds"),
        ({"faults": [3]}, "faults[0]"),
    ],
)
def test_a_bad_script_names_its_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_script({**GOOD, **change})
    assert raised.value.param == named and raised.value.hint


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_script(path)
    for content, message in (
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"3", "kind"),
        (b" " * (SCRIPT_BYTES_MAX + 1), "larger than"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_script(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_script(Script(), tmp_path / "no" / "such" / "folder.json")


def test_hostile_sizes_stay_small() -> None:
    """The largest script that a file may ask for of one call still ends, and soon."""
    system = System(kv_blocks=4096, block_tokens=16, context_len=8192, step_tokens=64)
    script = Script(0, system, (Call("c", 0.0, 2, 8000, 190),), ())
    result = run_checked(replace(script, system=system), thoroughly=False)
    assert result.is_ok and result.ends["length"] == 2
