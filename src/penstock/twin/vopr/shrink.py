"""From a failing script to a short one that fails in the same check.

Greedy: every simplification that keeps the failure stays, until a whole round finds none. The number of runs
is bounded, and a shrunk script is always one that was seen to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from penstock.twin.vopr.run import run_checked
from penstock.twin.vopr.script import Call, Fault, FaultKind, Script, System

SHRINK_RUNS_MAX = 2000

Item = TypeVar("Item", Call, Fault)
Progress = Callable[[int, Script], None]


@dataclass(slots=True)
class _Hunt:
    """The shortest failing script so far, and the runs that are left."""

    best: Script
    check: str
    thoroughly: bool
    on_progress: Progress
    runs: int = 0

    def offer(self, script: Script) -> bool:
        """Take `script` if it fails as the first one did."""
        if self.runs >= SHRINK_RUNS_MAX or script == self.best:
            return False
        self.runs += 1
        failure = run_checked(script, thoroughly=self.thoroughly).failure
        if failure is None or failure.check != self.check:
            return False
        self.best = script
        self.on_progress(self.runs, script)
        return True


def shrink(
    script: Script, check: str, *, thoroughly: bool, on_progress: Progress = lambda runs, script: None
) -> Script:
    """`script` fails in `check` (under `run_checked`). Deterministic; makes at most SHRINK_RUNS_MAX runs."""
    hunt = _Hunt(script, check, thoroughly, on_progress)
    before = None
    while before != hunt.best and hunt.runs < SHRINK_RUNS_MAX:
        before = hunt.best
        _drop(hunt, "faults", hunt.best.faults)
        _drop(hunt, "calls", hunt.best.calls)
        _simplify_system(hunt)
        _simplify_each(hunt, "calls", _simpler_calls)
        _simplify_each(hunt, "faults", _simpler_faults)
    return hunt.best


def _drop(hunt: _Hunt, name: str, items: Sequence[Item]) -> None:
    """Leave out halves, then quarters, and so on down to single ones."""
    size = max(1, len(items) // 2)
    kept = list(items)
    while kept:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if hunt.offer(_with(hunt.best, name, fewer)):
                kept = fewer
            else:
                start += size
        if size == 1:
            return
        size //= 2


def _simplify_each(hunt: _Hunt, name: str, simpler: Callable[[Any], Iterator[dict[str, Any]]]) -> None:
    for index in range(len(getattr(hunt.best, name))):
        for changes in simpler(getattr(hunt.best, name)[index]):
            items = list(getattr(hunt.best, name))
            items[index] = replace(items[index], **changes)
            hunt.offer(_with(hunt.best, name, items))


def _simplify_system(hunt: _Hunt) -> None:
    for changes in _simpler_systems(hunt.best.system):
        hunt.offer(replace(hunt.best, system=replace(hunt.best.system, **changes)))


def _with(script: Script, name: str, items: Sequence[Call] | Sequence[Fault]) -> Script:
    changes: dict[str, Any] = {name: tuple(items)}
    return replace(script, **changes)


def _simpler_systems(system: System) -> Iterator[dict[str, Any]]:
    """Plain values first, then sizes that are smaller."""
    plain = System()
    for name in (
        "queue_requests_max", "queue_tokens_max", "queue_wait_s_max", "tenant_requests_max", "stall_s",
        "link_jitter_s", "kv_lost_blocks", "mid_step", "lanes", "rank", "admit", "compose", "preempt",
        "retain", "host_kv_blocks", "kv_group_tokens", "copy_block_s", "exact", "link_s", "step_token_s",
        "step_base_s",
    ):  # fmt: skip
        yield {name: getattr(plain, name)}
    yield {"repeat": False}
    yield {"prefix_cache": False}
    for name, least in (("running_max", 1), ("engine_ahead", 0), ("kv_blocks", 1), ("step_tokens", 1)):
        for smaller in _smaller(getattr(system, name), least):
            yield {name: smaller}


def _simpler_calls(call: Call) -> Iterator[dict[str, Any]]:
    plain = Call("")
    for name in (
        "deadline_s",
        "tenant",
        "priority",
        "salt",
        "session",
        "slo_class",
        "group_tokens",
        "last_turn",
        "tool",
        "pin_s",
        "keyed",
        "stops_after_tokens",
        "stem_tokens",
        "stem",
        "choices",
    ):
        yield {name: getattr(plain, name)}
    yield {"at_s": 0.0}
    yield {"at_s": round(call.at_s, 2)}
    for name, least in (("prompt_tokens", 1), ("output_tokens", 1), ("stem_tokens", 0), ("choices", 1)):
        for smaller in _smaller(getattr(call, name), least):
            yield {name: smaller}


def _simpler_faults(fault: Fault) -> Iterator[dict[str, Any]]:
    yield {"at_s": 0.0}
    yield {"at_s": round(fault.at_s, 2)}
    if fault.kind is not FaultKind.SLOW:
        yield {"seconds": round(fault.seconds, 1)}


def _smaller(value: int, least: int) -> list[int]:
    """The least, half of it, one less: what is still smaller than `value`."""
    return [each for each in dict.fromkeys((least, value // 2, value - 1)) if least <= each < value]
