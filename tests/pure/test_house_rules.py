"""What must never break about the structure: one-way imports, pure decisions, a cheap `import penstock`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import penstock

ROOT = Path(penstock.__file__).parent

# room → rooms of ours it may import
MAY_IMPORT = {
    "core": set(),
    "models": {"core"},
    "policies": {"core"},
    "replica": {"core", "policies"},
    "desk": {"core", "policies"},
    "workloads": {"core"},
    "engine": {"core", "policies", "models", "replica"},
    "twin": {"core", "policies", "models", "replica", "desk", "workloads"},
    "gateway": {"core", "policies", "models", "replica", "desk"},
    "cli": {"core", "policies", "models", "replica", "desk", "workloads", "engine", "gateway", "twin"},
}
# Decision code takes time as an argument, and randomness as a named stream; it does no I/O.
PURE_ROOMS = ("policies", "replica", "desk")
IMPURE_MODULES = {
    "torch",
    "asyncio",
    "time",
    "random",
    "logging",
    "socket",
    "threading",
    "subprocess",
    "os",
    "secrets",
}
MODELS_NEVER_TORCH = {"torch", "transformers"}


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Dotted names of every module imported anywhere in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the direction"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_in(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names if name.startswith("penstock.")]
    return {part[1] for part in parts if part[1] in MAY_IMPORT}


def test_every_room_is_known() -> None:
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_one_way(room: str) -> None:
    assert files_of(room)
    for path in files_of(room):
        beyond = rooms_in(imports_of(path)) - MAY_IMPORT[room] - {room}
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


@pytest.mark.parametrize("room", PURE_ROOMS)
def test_decision_code_is_pure(room: str) -> None:
    for path in files_of(room):
        modules = {name.split(".")[0] for name in imports_of(path)}
        assert not modules & IMPURE_MODULES, f"{path.relative_to(ROOT)} imports {modules & IMPURE_MODULES}"


def test_model_descriptions_need_no_torch() -> None:
    for path in files_of("models"):
        modules = {name.split(".")[0] for name in imports_of(path)}
        assert not modules & MODELS_NEVER_TORCH, path


def test_the_checks_bite(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    import time\n    from penstock.gateway import app\n")
    assert "time" in imports_of(bad)
    assert rooms_in(imports_of(bad)) == {"gateway"}


@pytest.mark.parametrize(
    "module",
    [
        "penstock",
        "penstock.replica.replica",
        "penstock.workloads",
        "penstock.cli.main",
        "penstock.models.config",
    ],
)
def test_imports_are_cheap(module: str) -> None:
    heavy = ["torch", "fastapi", "transformers", "tokenizers", "polars", "pydantic"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_outgrows_one_sitting() -> None:
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path.relative_to(ROOT)
