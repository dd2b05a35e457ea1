"""Every checker bites: one seeded mutant at a time, which the fault simulation must find.

Each mutant of `vopr_mutants` spoils one behaviour of the real desk, replica or pool; the seeds are the first
ones, drawn as always. A mutant that survives means that a checker has gone blind.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from vopr_mutants import MUTANTS, SWAPPING

from penstock.twin import vopr
from penstock.twin.vopr import draw_script, run_checked

SEEDS_MAX = 1500


def first_failure(seeds: Iterable[int]) -> tuple[int, str] | None:
    for seed in seeds:
        failure = run_checked(draw_script(seed), thoroughly=True).failure
        if failure is not None:
            return seed, failure.check
    return None


def swapping_seeds() -> Iterator[int]:
    """The first of those whose systems copy KV beside the steps."""
    drawn = ((seed, draw_script(seed).system) for seed in range(40 * SEEDS_MAX))
    return islice(
        (s for s, system in drawn if system.preempt == "fastswitch" and system.host_kv_blocks), SEEDS_MAX
    )


def test_the_seeds_pass_without_a_mutant() -> None:
    assert first_failure(range(100)) is None


@pytest.mark.pure
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, checks = MUTANTS[name]
    mutate(monkeypatch)
    found = first_failure(swapping_seeds() if name in SWAPPING else range(SEEDS_MAX))
    assert found is not None, f"no seed below {SEEDS_MAX} finds it"
    assert found[1].startswith(tuple(checks.split("|"))), found


def names_of_checks() -> set[str]:
    """As the sources write them: `require(holds, NAME, …)`, `CheckFailed(NAME, …)`, `Failure(NAME, …)`."""
    places = {"require": 1, "CheckFailed": 0, "Failure": 0}
    found = set()
    for path in Path(vopr.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in places:
                name = node.args[places[node.func.id]]
                found |= {name.value} if isinstance(name, ast.Constant) else set()
    return found


def test_every_check_is_proven() -> None:
    """Each one is the only check that may find some mutant."""
    proven = {checks for _, checks in MUTANTS.values()}
    assert len(names_of_checks()) > 15 and names_of_checks() <= proven, names_of_checks() - proven
