"""The job planner's groups, lifts and order, on sets made by hand."""

from __future__ import annotations

import random

import pytest

from penstock.desk.job_plan import JobGroup, JobPlanner


def groups_of(prompts: list[list[int]], block_tokens: int = 1) -> set[tuple[int, tuple[int, ...]]]:
    plan = JobPlanner(block_tokens).prepare(prompts, [1.0] * len(prompts))
    return {(group.shared_len, tuple(sorted(group.members))) for group in plan.groups}


def test_a_group_is_lifted_when_it_saves_more_than_it_repeats() -> None:
    """(leaves - 1) · |g| > |c|: with |c| = 4 two members need more than 4 tokens of their own in common."""
    stem = [1, 2, 3, 4]
    alone = [[*stem, 90], [*stem, 91]]
    for own_len, lifted in ((4, False), (5, True)):
        own = list(range(10, 10 + own_len))
        found = groups_of([[*stem, *own, 70], [*stem, *own, 71], *alone])
        if lifted:
            assert found == {(4 + own_len, (0, 1)), (4, (2, 3))}
        else:
            assert found == {(4, (0, 1, 2, 3))}


def test_what_keeps_one_child_is_merged_with_it() -> None:
    shared = [1, 2, 3, 4, 5, 6]
    found = groups_of([[*shared, 9], [*shared, 8], [1, 2, 7]])
    assert found == {(6, (0, 1)), (0, (2,))}


def test_duplicates_and_prompts_that_begin_others_are_groups_too() -> None:
    assert groups_of([[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]) == {(3, (0, 1, 2))}
    plan = JobPlanner().prepare([[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]], [1.0] * 3)
    assert plan.saved_tokens == 2 + 3  # the last token of a duplicate is computed, to sample from


def test_only_full_blocks_are_shared() -> None:
    prompts = [[*range(10), 90], [*range(10), 91]]
    assert groups_of(prompts, block_tokens=4) == {(8, (0, 1))}
    assert groups_of(prompts, block_tokens=16) == {(0, (0,)), (0, (1,))}


def test_groups_with_most_output_for_their_prefill_go_first() -> None:
    prompts = [[1] * 100 + [2], [1] * 100 + [3], [5] * 10, [6] * 40]
    plan = JobPlanner().prepare(prompts, [10.0, 10.0, 50.0, 2.0])
    # R: 20 / 102, 50 / 10, 2 / 40
    assert plan.groups == (JobGroup(0, (2,)), JobGroup(100, (0, 1)), JobGroup(0, (3,)))
    assert [member for member, _ in plan.order] == [2, 0, 1, 3]
    assert plan.prefill_tokens(plan.groups[1]) == 102


def test_equal_groups_keep_the_order_of_the_input() -> None:
    prompts = [[7, index] for index in range(3)] + [[8, 1], [9, 1]]
    plan = JobPlanner(4).prepare(prompts, [1.0] * 5)
    assert [member for member, _ in plan.order] == [0, 1, 2, 3, 4]


def test_an_empty_job_has_an_empty_plan() -> None:
    plan = JobPlanner().prepare([], [])
    assert plan.groups == () and plan.saved_tokens == 0


def test_a_shuffled_job_is_grouped_to_the_bound() -> None:
    """100 documents × 20 questions, prefix 2000, suffix 200 (card test 1): 86.4 % can be saved."""
    draw = random.Random("documents")
    documents = [[draw.randrange(50_000) for _ in range(2000)] for _ in range(100)]
    prompts = [document + [draw.randrange(50_000) for _ in range(200)] for document in documents * 20]
    draw.shuffle(prompts)
    plan = JobPlanner(16).prepare(prompts, [16.0] * len(prompts))
    assert len(plan.groups) == 100
    bound = 19 * 2000 / (20 * 2200)
    assert plan.saved_tokens / plan.prompt_tokens >= 0.99 * bound


@pytest.mark.parametrize("shape", ["chain", "star", "comb"])
def test_deep_and_wide_trees_are_planned(shape: str) -> None:
    """No recursion, and nothing quadratic in the number of prompts."""
    count = 2000
    if shape == "chain":
        prompts = [[1] * length for length in range(1, count)]
    elif shape == "star":
        prompts = [[index, index + 1] for index in range(20 * count)]
    else:
        prompts = [[1] * (length // 2) + [2 + length % 2] for length in range(count)]
    plan = JobPlanner().prepare(prompts, [1.0] * len(prompts))
    assert sum(len(group.members) for group in plan.groups) == len(prompts)
