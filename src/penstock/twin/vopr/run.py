"""One script, run and judged."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field, replace

from penstock.twin.vopr.failure import CheckFailed
from penstock.twin.vopr.script import Script
from penstock.twin.vopr.world import World

EndFacts = dict[str, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Failure:
    """Which check failed, and how. Shrinking keeps `check`."""

    check: str
    message: str
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunResult:
    """`digest` covers every plan, event and decision of the run."""

    digest: str
    failure: Failure | None
    requests: int
    steps: int
    restarts: int
    preemptions: int
    is_dead: bool
    ends: dict[str, int]  # how many requests ended how
    end_facts: EndFacts = field(repr=False)  # request id → how and when it ended

    @property
    def is_ok(self) -> bool:
        return self.failure is None


def run_script(script: Script) -> RunResult:
    """Deterministic. An exception of the product is a failure like any other; none gets out."""
    world = World(script)
    failure = None
    try:
        world.run()
    except CheckFailed as error:
        failure = Failure(error.check, error.message, tuple(world.journal.last_lines))
    except Exception as error:  # whatever the system under test raises is what we are looking for
        failure = _failure_of(error, world)
    return RunResult(
        world.journal.digest,
        failure,
        len(world.front.offered),
        world.engine.steps,
        world.engine.restarts,
        world.checkers.preemptions,
        world.engine.is_dead,
        world.checkers.ends(),
        world.checkers.end_facts(),
    )


def run_checked(script: Script, *, thoroughly: bool) -> RunResult:
    """`thoroughly`: also run it a second time, and without leaps, and compare. Deterministic."""
    result = run_script(script)
    if not thoroughly or not result.is_ok:
        return result
    again = run_script(script)
    if again.digest != result.digest:
        return replace(result, failure=Failure("determinism", "two runs of one script differ"))
    if script.system.repeat and not script.system.mid_step:
        return _compared_without_leaps(script, result)
    return result


def _compared_without_leaps(script: Script, result: RunResult) -> RunResult:
    """A plan that stands for many steps changes no end and no instant.

    Not asked of an engine that hears commands within a step, since a leap is one longer step.
    """
    plain = run_script(replace(script, system=replace(script.system, repeat=False)))
    if plain.failure is not None:
        return replace(result, failure=plain.failure)
    for name, facts in result.end_facts.items():
        if plain.end_facts.get(name) != facts:
            message = f"{name} ends as {facts}, and without leaps as {plain.end_facts.get(name)}"
            return replace(result, failure=Failure("leaps", message))
    return result


def _failure_of(error: Exception, world: World) -> Failure:
    """Named by the kind of error and the function that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    kind = type(error).__name__
    return Failure(
        f"{kind} in {frame.name}", str(error) or f"{kind}: {frame.line}", tuple(world.journal.last_lines)
    )
