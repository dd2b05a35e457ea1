"""The compiled forms are taken only when they are what the Python files say, and change no decision."""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import compiled

LOAD = ("sample:burstgpt1", "--time-scale", "400", "--hardware", "h100-sxm")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one compiled module."""
    (tmp_path / "_fast").mkdir()
    (tmp_path / "step.py").write_text("x = 1\n")
    (tmp_path / "_fast" / "penstock.step.so").write_bytes(b"")
    monkeypatch.setattr(compiled, "PACKAGE", tmp_path)
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "_fast")
    monkeypatch.setattr(compiled, "INDEX", tmp_path / "_fast" / "index.json")
    monkeypatch.delenv(compiled.PURE_VARIABLE, raising=False)
    write_index(tmp_path)
    return tmp_path


def write_index(package: Path, **changes: object) -> None:
    index: dict[str, object] = {
        "python": sys.implementation.cache_tag,
        "sources": {"step.py": compiled.digest(package / "step.py")},
        "modules": {"penstock.step": "penstock.step.so"},
    }
    (package / "_fast" / "index.json").write_text(json.dumps(index | changes))


def found() -> dict[str, Path]:
    return compiled.files.__wrapped__()


def test_a_fresh_form_is_found(folder: Path) -> None:
    assert found() == {"penstock.step": folder / "_fast" / "penstock.step.so"}


def test_an_edited_source_takes_effect_at_once(folder: Path) -> None:
    (folder / "step.py").write_text("x = 2\n")
    assert found() == {}


def test_it_can_be_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.PURE_VARIABLE, "1")
    assert found() == {}
    monkeypatch.setenv(compiled.PURE_VARIABLE, "0")
    assert found()


@pytest.mark.parametrize(
    "changes",
    [{"python": "cpython-27"}, {"sources": {"gone.py": ""}}, {"modules": {"penstock.step": "gone.so"}}],
)
def test_what_does_not_fit_is_left_out(folder: Path, changes: dict[str, object]) -> None:
    write_index(folder, **changes)
    assert found() == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"python": 3}', "\x00"])
def test_a_damaged_index_is_left_out(folder: Path, text: str) -> None:
    (folder / "_fast" / "index.json").write_text(text)
    assert found() == {}


def test_both_forms_decide_alike() -> None:
    """Byte for byte the same report, from processes of both kinds."""
    if not compiled.FOLDER.exists():
        pytest.skip("nothing was compiled: mypyc or a C compiler was missing at install")
    command = [sys.executable, "-m", "penstock.cli.main", "simulate", *LOAD, "--json"]
    reports = [
        subprocess.run(
            command, env=os.environ | {compiled.PURE_VARIABLE: pure}, stdout=subprocess.PIPE, check=True
        ).stdout
        for pure in ("0", "1")
    ]
    assert reports[0] == reports[1] and len(reports[0]) > 1000


def test_this_process_runs_what_it_says() -> None:
    from penstock.replica import replica

    loader = replica.__spec__.loader
    assert isinstance(loader, importlib.machinery.ExtensionFileLoader) == compiled.is_used()
