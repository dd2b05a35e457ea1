"""`penstock fidelity` end to end on a tiny model: the plumbing, not the size of the error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
from benchmarks.server_process import Ended, ServerProcess, run_penstock

from penstock.twin.fidelity import METRICS, STATISTICS

LOAD = ("sample:burstgpt1", "--limit", "15", "--length-divisor", "16", "--max-prompt-tokens", "60")


@pytest.fixture(scope="module")
def profile(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Any profile does; this one is measured as a user would."""
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    ended = run_penstock(
        "calibrate", "--served", "--model", str(tiny_folder), "--threads", "1", "--out", str(path)
    )
    assert ended.code == 0, ended.stderr
    assert "calibrate --served" in path.read_text()
    return path


def fidelity(*arguments: object) -> Ended:
    return run_penstock("fidelity", *LOAD, *map(str, arguments), "--json")


def assert_complete(ended: Ended, regimes: int) -> dict[str, object]:
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert (found["schema"], found["version"]) == ("penstock-fidelity", 1)
    assert len(found["regimes"]) == regimes
    for regime in found["regimes"]:
        assert regime["requests"] == regime["live_answered"] == regime["twin_answered"] > 8
        assert set(regime["errors"]) == set(METRICS)
        for statistics in regime["errors"].values():
            assert set(statistics) == set(STATISTICS)
            for error in statistics.values():
                assert error["live_ms"] > 0 and error["twin_ms"] > 0
                expected = (error["twin_ms"] - error["live_ms"]) / error["live_ms"]
                assert error["error_frac"] == pytest.approx(expected)
    return dict(found)


def test_with_a_server_of_its_own(tiny_folder: Path, profile: Path, tmp_path: Path) -> None:
    ended = fidelity(
        "--model", tiny_folder, "--threads", 1, "--kv-memory", "3MiB", "--profile", profile,
        "--loads", "0.4,0.8", "--out", tmp_path,
    )  # fmt: skip
    found = assert_complete(ended, 2)
    assert isinstance(found["capacity_rps"], float) and found["capacity_rps"] > 0
    assert json.loads((tmp_path / "fidelity.json").read_text()) == found
    slow, fast = found["regimes"]  # type: ignore[misc]
    assert fast["requested_rps"] == pytest.approx(2 * slow["requested_rps"])
    serving = [p for p in psutil.process_iter(["cmdline"]) if _serves(p, tiny_folder)]
    assert not serving, "the server it started is gone"


def test_against_a_server_that_runs(server: ServerProcess, tiny_folder: Path, profile: Path) -> None:
    ended = fidelity(
        "--url", server.url, "--model", tiny_folder, "--profile", profile, "--rate-scales", "20000",
        "--kv-memory", "4MiB", "--running-max", 4, "--closed-loop",
    )  # fmt: skip
    found = assert_complete(ended, 1)
    assert found["capacity_rps"] is None and "--url" in str(found["notes"])


def test_what_it_refuses(tiny_folder: Path, profile: Path, tmp_path: Path) -> None:
    ended = fidelity("--model", tiny_folder, "--profile", profile, "--loads", "many")
    assert ended.code == 2 and re.search(r"--loads many", ended.stderr)
    ended = fidelity("--model", tiny_folder, "--profile", tmp_path / "none.toml")
    assert ended.code == 2 and "Traceback" not in ended.stderr
    ended = fidelity("--model", tiny_folder, "--profile", profile, "--url", "http://127.0.0.1:9")
    assert ended.code == 3 and "no server answers" in ended.stderr


def _serves(process: psutil.Process, folder: Path) -> bool:
    words = process.info["cmdline"] or []
    return "serve" in words and str(folder) in words and "3MiB" in words
