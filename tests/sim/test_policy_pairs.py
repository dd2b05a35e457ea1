"""Any two policies of different slots work together, or are refused together.

A short version of `python -m benchmarks.effects.pairs`: the same load and checks, with fewer requests.
"""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.effects.baselines import ShortestPrompt, baseline
from benchmarks.effects.pair_load import draw_load
from benchmarks.effects.pairs import (
    PairFailed,
    all_pairs,
    check_leaps,
    check_refused,
    place_of_unloved,
    run_of,
    run_pair,
    stack_with,
)

from penstock.core.events import TokenOut
from penstock.core.settings import PolicySettings
from penstock.policies.retain.lru import Lru
from penstock.policies.stack import REGISTRIES
from penstock.replica.replica import Replica

REQUESTS = 50
PAIRS = [pytest.param(pair, id="+".join(name for _, name in pair)) for pair in all_pairs()]
DEFAULTS = PolicySettings().names()


@pytest.mark.parametrize("pair", PAIRS)
def test_the_pair_keeps_every_promise(pair: tuple[tuple[str, str], tuple[str, str]]) -> None:
    names = stack_with(pair)
    if names is None:
        assert "cannot stand together" in check_refused(pair)
        return
    assert dict(pair).items() <= names.items()
    assert run_pair(names, REQUESTS, sample=REQUESTS, seed=REQUESTS).steps > 50


def test_every_two_policies_of_different_slots_are_a_pair() -> None:
    sizes = [len(registry.names()) for registry in REGISTRIES.values()]
    assert len(PAIRS) == (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2


def test_the_load_does_what_it_is_for() -> None:
    """A run of nothing but easy steps would prove little."""
    load = draw_load(300, seed=3)
    requests = [turn.request for program in load.programs for turn in program]
    assert 300 <= load.count < 310
    assert sum(request.leader_id is not None for request in requests) > 10
    assert sum(request.program_id is not None for request in requests) > 30
    assert sum(request.group_id is not None for request in requests) > 20
    assert sum(bool(request.stop_token_ids) for request in requests) > 50
    assert {request.slo_class for request in requests} == {"chat", "batch", "default"}
    assert any(turn.cancel_after_s for program in load.programs for turn in program)
    result = run_of(DEFAULTS, load).run()
    assert result.preemptions > 5 and result.hits > 1000


def test_the_flood_starves_somebody_where_it_may() -> None:
    """Else it would prove nothing that the ranks which promise otherwise pass."""
    with baseline("rank", ShortestPrompt) as shortest:
        assert place_of_unloved(DEFAULTS | {"rank": shortest}) > 0.9
    assert place_of_unloved(DEFAULTS) < 0.3


def test_a_lost_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Replica.complete

    def forgetful(self: Replica, *arguments: Any) -> list[Any]:
        events = complete(self, *arguments)
        told = [event for event in events if isinstance(event, TokenOut)]
        return [event for event in events if event is not told[0]] if len(told) > 6 else events

    monkeypatch.setattr(Replica, "complete", forgetful)
    with pytest.raises(PairFailed, match="and not"):
        run_of(DEFAULTS, draw_load(100, seed=1)).run()


def test_a_policy_that_counts_calls_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaps make fewer calls; a decision that depends on their number gives other instants."""
    calls = 0

    def fickle(self: Any, view: Any, now_s: float) -> int:
        nonlocal calls
        calls += 1
        return 1 + (calls % 7) * 4

    monkeypatch.setattr(type(REGISTRIES["compose"].make("sarathi")), "prefill_room", fickle)
    with pytest.raises(PairFailed, match="leaps"):
        check_leaps(DEFAULTS, draw_load(200, seed=2))


def test_a_retain_policy_that_gives_away_what_is_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It forgets that a block was revived, and names it as the next to drop."""
    monkeypatch.setattr(Lru, "revived", lambda self, block: None)
    with pytest.raises(AssertionError):
        run_of(DEFAULTS, draw_load(300, seed=3)).run()
