"""What a plan hands over of sequences that came and went while it was made."""

from __future__ import annotations

from penstock.core.request import Request
from penstock.replica.draft import PlanDraft
from penstock.replica.sequence import Sequence


def sequence(seq_id: int, *blocks: int) -> Sequence:
    made = Sequence(seq_id, Request(f"r{seq_id}", 8, 4, 0.0), 0.0)
    made.blocks = list(blocks)
    return made


def test_blocks_of_who_left_and_came_back_are_not_given_twice() -> None:
    """Given a block, preempted, and started again with other blocks, all before one step."""
    draft, back, stays = PlanDraft(), sequence(1, 4), sequence(2, 5)
    draft.give(back, [2])
    draft.give(stays, [6])
    draft.end(back)
    back.blocks = [7, 8]
    draft.start(back)
    draft.give(back, [9])
    plan = draft.plan(0, [], 1, frozenset())
    assert plan.ends == [1] and [start.blocks for start in plan.starts] == [(7, 8)]
    assert plan.new_blocks == [(2, [6]), (1, [9])]


def test_who_started_and_left_within_one_plan_is_never_told() -> None:
    draft, one = PlanDraft(), sequence(1, 4)
    draft.start(one)
    draft.give(one, [5])
    draft.end(one)
    plan = draft.plan(0, [], 1, frozenset())
    assert (plan.starts, plan.ends, plan.new_blocks) == ([], [], [])
    draft.give(one, [3])
    assert draft.plan(1, [], 1, frozenset()).new_blocks == [(1, [3])], "the next plan begins afresh"
