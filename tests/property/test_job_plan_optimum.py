"""The job planner against the exact optimum, and what any plan must keep (card batchllm)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.desk.job_plan import JobPlan, JobPlanner


def best_saving(prompts: Sequence[Sequence[int]]) -> int:
    """The most tokens that any partition into groups with one level of sharing saves.

    Dynamic programme over the trie: at depth d any k prompts still open may be closed as a group, which
    saves (k - 1) · d.
    """

    def best(members: list[int], depth: int) -> list[int]:
        """saving[j]: the most saved below, with j members still open."""
        ended = [member for member in members if len(prompts[member]) == depth]
        children: dict[int, list[int]] = {}
        for member in members:
            if len(prompts[member]) > depth:
                children.setdefault(prompts[member][depth], []).append(member)
        saving = [-1] * len(ended) + [0]
        for child in children.values():
            below = best(child, depth + 1)
            merged = [-1] * (len(saving) + len(below) - 1)
            for i, a in enumerate(saving):
                for j, b in enumerate(below):
                    if a >= 0 and b >= 0:
                        merged[i + j] = max(merged[i + j], a + b)
            saving = merged
        closed = list(saving)
        for still_open in range(len(saving)):
            for before in range(still_open + 1, len(saving)):
                if saving[before] >= 0:
                    gain = saving[before] + (before - still_open - 1) * depth
                    closed[still_open] = max(closed[still_open], gain)
        return closed

    return best(list(range(len(prompts))), 0)[0] if prompts else 0


def saved_by_definition(plan: JobPlan) -> int:
    return sum((len(group.members) - 1) * group.shared_len for group in plan.groups)


def planned(prompts: list[list[int]], block_tokens: int = 1) -> JobPlan:
    return JobPlanner(block_tokens).prepare(prompts, [1.0] * len(prompts))


prompt_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=12)


@given(prompt_lists, st.sampled_from([1, 2, 4]))
@settings(max_examples=300, deadline=None)
def test_every_prompt_is_in_one_group_that_it_begins_like(prompts: list[list[int]], block: int) -> None:
    plan = planned(prompts, block)
    assert sorted(member for group in plan.groups for member in group.members) == list(range(len(prompts)))
    for group in plan.groups:
        assert group.shared_len % block == 0
        prefix = prompts[group.members[0]][: group.shared_len]
        assert len(prefix) == group.shared_len
        assert all(prompts[member][: group.shared_len] == prefix for member in group.members)
        assert group.shared_len > 0 or len(group.members) == 1


@given(prompt_lists)
@settings(max_examples=300, deadline=None)
def test_no_plan_saves_more_than_the_optimum(prompts: list[list[int]]) -> None:
    plan = planned(prompts)
    assert 0 <= plan.saved_tokens <= saved_by_definition(plan) <= best_saving(prompts)
    physical = sum(plan.prefill_tokens(group) for group in plan.groups)
    assert plan.saved_tokens == plan.prompt_tokens - physical


@given(prompt_lists)
@settings(max_examples=100, deadline=None)
def test_saving_in_blocks_never_exceeds_saving_in_tokens(prompts: list[list[int]]) -> None:
    assert planned(prompts, 4).saved_tokens <= best_saving(prompts)


def random_set(draw: random.Random) -> list[list[int]]:
    """A few documents, some with a common stem, each asked several questions; lengths vary."""
    stems = [[draw.randrange(50) for _ in range(draw.randrange(1, 12))] for _ in range(3)]
    documents = [
        draw.choice(stems) + [draw.randrange(50) for _ in range(draw.randrange(1, 20))] for _ in range(4)
    ]
    return [
        draw.choice(documents) + [draw.randrange(50) for _ in range(draw.randrange(0, 8))]
        for _ in range(draw.randrange(2, 14))
    ]


def test_the_greedy_lift_is_near_the_optimum() -> None:
    """The card found 99.5 % of the saving over 400 random sets, 91 % at worst, exact in 86 %."""
    draw = random.Random("job plans")
    saved = best = exact = 0
    worst = 1.0
    for _ in range(400):
        prompts = random_set(draw)
        mine, most = saved_by_definition(planned(prompts)), best_saving(prompts)
        saved, best, exact = saved + mine, best + most, exact + (mine == most)
        worst = min(worst, mine / most) if most else worst
    assert saved / best >= 0.98
    assert worst >= 0.75
    assert exact / 400 >= 0.7
