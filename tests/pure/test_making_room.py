"""Who yields to whom, on views made by hand: for a slot, for KV, and when nobody may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from one_server import Standing

from penstock.core.reasons import WaitReason
from penstock.core.request import Request
from penstock.policies.context import Context
from penstock.policies.estimate.programs import Programs
from penstock.policies.preempt import Preempt
from penstock.policies.stack import REGISTRIES
from penstock.policies.view import Candidate, Refusal

DISPLACING = ("swap", "fastswitch")


@dataclass
class View:
    """Running sequences in rank order; the head outranks those of `outranked`."""

    running: Sequence[Standing]
    outranked: Sequence[Standing] = ()
    blocks_available: int = 0
    block_tokens: int = 4

    @property
    def running_count(self) -> int:
        return len(self.running)

    def outranks(self, head: Standing, other: Standing) -> bool:
        return other in self.outranked


def standing(index: int, blocks: int = 1, prompt: int = 4, **hints: Any) -> Standing:
    return Standing(Request(f"r{index}", prompt, 100, 0.0, **hints), index, block_count=blocks)


def started(policy: Preempt, *sequences: Standing) -> None:
    """They run, and each has had a token since it started."""
    for sequence in sequences:
        policy.started(sequence, 0.0)  # type: ignore[arg-type]
        sequence.output_len += 1


def yields(policy: Preempt, candidate: Candidate, reason: WaitReason, view: View) -> Any:
    return policy.make_room(Refusal(candidate, reason), view, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*DISPLACING, "priority"])
def test_for_kv_somebody_yields_only_where_all_who_may_free_enough(name: str) -> None:
    """The head needs ten blocks; three are found, two of these among the available ones: 7 + 2 to be free."""
    policy = REGISTRIES["preempt"].make(name, Context())
    first, *behind = running = [standing(0, 50), standing(1, 3), standing(2, 2)]
    started(policy, *running)
    head = Candidate(standing(9, prompt=40), 12, blocks_cached=3, blocks_revived=2)  # type: ignore[arg-type]
    for available, victim in ((4, behind[-1]), (3, None)):
        view = View(running, behind, available)
        assert yields(policy, head, WaitReason.KV_CAPACITY, view) is victim
    assert yields(policy, head, WaitReason.KV_CAPACITY, View(running, (), 4)) is None
    assert yields(policy, head, WaitReason.SLOTS, View(running, behind)) is behind[-1], (
        "any of them has a slot"
    )


@pytest.mark.parametrize("name", DISPLACING)
def test_who_had_no_token_since_it_started_is_spared(name: str) -> None:
    policy = REGISTRIES["preempt"].make(name, Context())
    oldest, older, young = running = [standing(index) for index in range(3)]
    started(policy, oldest, older)
    policy.started(young, 0.0)  # type: ignore[arg-type]
    head = Candidate(standing(9), 0, 0, 0)  # type: ignore[arg-type]
    assert yields(policy, head, WaitReason.SLOTS, View(running, running)) is older
    for needy, victim in ((oldest, older), (older, young), (young, young)):
        assert policy.victim(needy, View(running), 0.0) is victim  # type: ignore[arg-type]
    young.output_len += 1
    assert policy.victim(oldest, View(running), 0.0) is young  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DISPLACING)
def test_somebody_yields_where_the_head_would_then_be_alone(name: str) -> None:
    """However little the books say that they free: what nobody holds is available."""
    policy = REGISTRIES["preempt"].make(name, Context())
    running = [standing(0), standing(1)]
    started(policy, *running)
    head = Candidate(standing(9, prompt=40), 0, 0, 0)  # type: ignore[arg-type]
    assert yields(policy, head, WaitReason.KV_CAPACITY, View(running, running, 0)) is running[-1]
    assert yields(policy, head, WaitReason.KV_CAPACITY, View(running, running[1:], 0)) is None


def test_the_youngest_program_yields_and_last_turns_after_all_others() -> None:
    context = Context()
    policy = REGISTRIES["preempt"].make("program", context)
    turns = [
        standing(0, program_id="a"),
        standing(1, program_id="b"),
        standing(2, program_id="c", is_last_turn=True),
        standing(3, program_id="a"),
    ]
    for turn in turns:
        context.shared(Programs).submitted(turn, 0.0)  # type: ignore[arg-type]
    left, order = list(turns), []
    while left:
        victim: Any = policy.victim(left[0], View(left), 0.0)  # type: ignore[arg-type]
        left.remove(victim)
        order.append(victim.arrival_index)
    assert order == [1, 3, 0, 2], "of one program the later call, and who leaves for good at the very last"
