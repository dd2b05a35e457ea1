"""BatchLLM's policies on small replicas: group execution, order, lifetime of prefixes, and the KV limit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_executor import FakeExecutor, expected_output, make_replica
from one_server import Standing

from penstock.core.events import Admitted, Finished, TokenOut
from penstock.core.reasons import CancelReason
from penstock.core.request import Request
from penstock.policies.compose import COMPOSE
from penstock.policies.compose.memory_centric import _peak_tokens, _Running
from penstock.policies.context import Context
from penstock.policies.estimate.groups import Groups
from penstock.policies.retain.prefix_lifetime import PrefixLifetime
from penstock.policies.stack import load_preset
from penstock.replica.replica import Replica

BATCHLLM = load_preset("batchllm")["policies"]
BLOCK = 4


def member(group: str, index: int, shared_len: int = 16, own_len: int = 3, output: int = 3) -> Request:
    prefix = [ord(group[-1]) + place for place in range(shared_len)]
    prompt = prefix + [500 + index] * own_len
    return Request(
        f"{group}/{index}",
        len(prompt),
        output,
        0.0,
        prompt_tokens=prompt,
        slo_class="batch",
        group_id=group,
        shared_len=shared_len,
    )


def single(name: str, prompt_len: int = 8, output: int = 2, slo_class: str = "default") -> Request:
    prompt = [sum(map(ord, name))] * prompt_len
    return Request(name, prompt_len, output, 0.0, prompt_tokens=prompt, slo_class=slo_class)


class Drive:
    """A replica with an executor that checks every position of KV."""

    def __init__(self, **system: object) -> None:
        self.replica: Replica = make_replica(kv_block_tokens=BLOCK, **{**BATCHLLM, **system})  # type: ignore[arg-type]
        self.executor = FakeExecutor(BLOCK)
        self.now_s = 0.0
        self.computed = 0  # prompt tokens
        self.admitted: list[str] = []
        self.outputs: dict[str, list[int]] = {}
        self.ended: list[str] = []

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.replica.submit(request, self.now_s)

    def step(self) -> bool:
        plan = self.replica.plan(self.now_s)
        if plan is None:
            return False
        assert {start.seq_id for start in plan.starts} <= {chunk.seq_id for chunk in plan.chunks}
        self.computed += sum(chunk.count for chunk in plan.chunks)
        self.now_s += 1.0
        for event in self.replica.complete(plan, self.executor.execute(plan), self.now_s):
            if isinstance(event, Admitted):
                self.admitted.append(event.request_id)
            elif isinstance(event, TokenOut):
                self.outputs.setdefault(event.request_id, []).append(event.token_id)
            elif isinstance(event, Finished):
                self.ended.append(event.request_id)
        self.replica.check_invariants()
        return True

    def run(self) -> None:
        while self.step():
            pass


# ---- group execution --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policies", [BATCHLLM, {"rank": "fcfs", "compose": "sarathi", "retain": "lru"}])
def test_a_prefix_is_computed_once(policies: dict[str, str]) -> None:
    """Under any stack that is told of the group; the default of no hints would compute it five times."""
    drive = Drive(step_tokens_max=100, **policies)
    group = [member("g", index) for index in range(5)]
    drive.submit(*group)
    drive.run()
    assert drive.computed == 16 + 5 * 3
    assert drive.outputs == {request.id: expected_output(request) for request in group}
    without = Drive(step_tokens_max=100)
    without.submit(*(replace(request, group_id=None, shared_len=0) for request in group))
    without.run()
    assert without.computed == 5 * (16 + 3)


def test_members_wait_and_say_why_while_others_go_on() -> None:
    drive = Drive(step_tokens_max=8)
    drive.submit(*(member("g", index) for index in range(3)))
    drive.step()
    assert drive.admitted == ["g/0"]
    assert drive.replica.stats().waiting_by_reason == {"group": 1, "behind_head": 1}
    drive.submit(single("chat"))
    drive.step()
    assert drive.admitted == ["g/0", "chat"]  # online goes first, and nobody waits for the group


def test_no_suffix_runs_before_its_prefix() -> None:
    drive = Drive(step_tokens_max=6)
    drive.submit(*(member(group, index) for group in "ab" for index in range(4)))
    while drive.step():
        for group in "ab":
            running = [s for s in drive.replica.running if s.request.group_id == group]
            behind = [s for s in running if s.computed_len < 16]
            assert len(behind) <= 1, "one member computes the prefix"
            assert len(running) == 1 or not behind, "the others have not started"


@pytest.mark.parametrize("steps", [1, 2])
def test_when_the_leader_is_cancelled_the_next_member_leads(steps: int) -> None:
    drive = Drive(step_tokens_max=6)
    drive.submit(*(member("g", index) for index in range(3)))
    for _ in range(steps):
        drive.step()
    drive.replica.cancel("g/0", CancelReason.ADMIN, drive.now_s)
    drive.run()
    assert sorted(drive.ended) == ["g/1", "g/2"]


def test_a_leader_that_must_yield_is_replaced() -> None:
    """Two groups, a pool for one and a half: whoever computes a prefix may be preempted."""
    drive = Drive(kv_blocks=9, step_tokens_max=12, running_max=8, compose="sarathi")
    requests = [member(group, index, output=8) for group in "ab" for index in range(3)]
    drive.submit(*requests)
    drive.run()
    assert drive.outputs == {request.id: expected_output(request) for request in requests}


def test_nobody_waits_for_what_cannot_be_shared() -> None:
    """No prefix cache, another salt, unknown content, or a shared part below one block."""
    group = [member("g", index) for index in range(2)]
    for requests, system in (
        (group, {"prefix_cache": False}),
        ([group[0], replace(group[1], cache_salt="other")], {}),
        ([group[0], replace(group[1], prompt_tokens=None)], {}),
        ([replace(request, shared_len=3) for request in group], {}),
    ):
        drive = Drive(step_tokens_max=100, **system)
        drive.submit(*requests)
        drive.replica.plan(0.0)
        assert drive.replica.running_count == 2


def test_duplicates_and_empty_suffixes_work() -> None:
    drive = Drive(step_tokens_max=100)
    requests = [member("g", index, own_len=0) for index in range(3)] + [member("g", 3, own_len=5)]
    drive.submit(*requests)
    drive.run()
    assert drive.outputs == {request.id: expected_output(request) for request in requests}
    assert drive.computed == 16 + 2 * 4 + 5  # a prompt's last token is always computed, and its block with it


# ---- rank -------------------------------------------------------------------------------------------------


def test_groups_stay_together_and_online_traffic_goes_first() -> None:
    drive = Drive(running_max=1)
    drive.submit(member("a", 0), member("b", 0), single("lone", slo_class="batch"), member("a", 1))
    drive.submit(single("chat"), member("b", 1))
    drive.run()
    assert drive.admitted == ["chat", "a/0", "a/1", "b/0", "b/1", "lone"]


def test_the_class_that_goes_behind_is_an_option() -> None:
    drive = Drive(running_max=1)
    drive.replica._stack.rank._batch_class = "bulk"  # type: ignore[attr-defined]
    drive.submit(single("slow", slo_class="bulk"), member("a", 0))
    drive.run()
    assert drive.admitted == ["a/0", "slow"]


def test_the_book_of_groups_holds_only_what_is_inside() -> None:
    drive = Drive()
    groups = next(each for each in drive.replica._stack.rank.__dict__.values() if isinstance(each, Groups))
    drive.submit(member("a", 0), member("a", 1))
    assert groups.is_open(("default", "a"))
    drive.run()
    assert not groups.is_open(("default", "a")) and not groups._groups


# ---- retain -----------------------------------------------------------------------------------------------


@dataclass
class Seen:
    request: Request
    arrival_index: int = 0


def test_a_prefix_lives_as_long_as_its_group() -> None:
    context = Context()
    retain = PrefixLifetime(context, None)  # type: ignore[arg-type]
    groups = context.shared(Groups)
    request, other = member("g", 0), single("chat")
    groups.submitted(Seen(request), 0.0)  # type: ignore[arg-type]
    retain.parked_at(3, 20, request, 0.0)  # beyond the shared 16 tokens: like anybody's
    for block, end_len in ((2, 16), (1, 12), (0, 8)):
        retain.parked_at(block, end_len, request, 0.0)
    retain.parked_at(9, 8, other, 1.0)
    assert len(retain) == 5
    assert [retain.victim(2.0), retain.victim(2.0)] == [3, 9]  # LRU among the others
    groups.finished(Seen(request), None, 3.0)  # type: ignore[arg-type]
    retain.parked_at(9, 8, other, 4.0)
    assert [retain.victim(5.0) for _ in range(4)] == [
        2,
        1,
        0,
        9,
    ]  # spent prefixes first, the last block first
    assert len(retain) == 0


def test_what_lies_behind_the_prefix_is_kept_like_anybodys() -> None:
    """23 tokens have KV, so five full blocks: four of the prefix that the next member needs, and one more."""
    drive = Drive(running_max=1)
    drive.submit(member("g", 0, own_len=5), member("g", 1))
    while not drive.ended:
        drive.step()
    retain = drive.replica._stack.retain
    assert [len(blocks) for blocks in retain._kept.values()] == [4]  # type: ignore[attr-defined]
    assert len(retain._others) == 1  # type: ignore[attr-defined]


def test_a_group_that_comes_back_finds_what_is_left() -> None:
    context = Context()
    retain = PrefixLifetime(context, None)  # type: ignore[arg-type]
    groups = context.shared(Groups)
    request, other = member("g", 0), single("chat")
    for _ in range(2):
        groups.submitted(Seen(request), 0.0)  # type: ignore[arg-type]
        groups.finished(Seen(request), None, 1.0)  # type: ignore[arg-type]
        retain.parked_at(0, 8, request, 1.0)
        retain.parked_at(5, 8, other, 2.0)
        groups.submitted(Seen(request), 3.0)  # type: ignore[arg-type]
        assert retain.victim(4.0) == 5
        retain.revived(0)
        groups.finished(Seen(request), None, 5.0)  # type: ignore[arg-type]
        assert len(retain) == 0


def test_when_only_living_prefixes_are_parked_one_of_them_gives() -> None:
    context = Context()
    retain = PrefixLifetime(context, None)  # type: ignore[arg-type]
    for name in "ab":
        context.shared(Groups).submitted(Seen(member(name, 0)), 0.0)  # type: ignore[arg-type]
    retain.parked_at(1, 8, member("a", 0), 0.0)
    retain.parked_at(2, 8, member("b", 0), 1.0)
    assert [retain.victim(2.0), retain.victim(2.0)] == [1, 2]


def test_every_prefix_is_freed_once_after_its_last_member() -> None:
    """A small pool and many groups: what is kept at the end belongs to nobody that lives."""
    drive = Drive(kv_blocks=24, step_tokens_max=16)
    drive.submit(*(member(group, index) for group in "abcdef" for index in range(4)))
    drive.run()
    assert len(drive.ended) == 24
    assert drive.computed == 6 * (16 + 4 * 3)
    assert drive.replica._stack.retain._kept == {}  # type: ignore[attr-defined]


# ---- compose ----------------------------------------------------------------------------------------------


@dataclass
class Grown:
    """A running sequence, as far as the peak asks."""

    total_len: int
    output_len: int


def test_the_peak_is_that_of_a_simulation() -> None:
    """Everybody adds a token a step and leaves at its expected end: brute force over random sets."""
    draw = random.Random("peaks")
    for _ in range(200):
        running = []
        for _ in range(draw.randrange(1, 8)):
            output_len = draw.randrange(5)
            sequence = Grown(draw.randrange(1, 50) + output_len, output_len)
            running.append(_Running(sequence, 0, output_len + draw.randrange(0, 30)))  # type: ignore[arg-type]
        peak = max(
            sum(entry.sequence.total_len + step for entry in running if entry.growth >= step)
            for step in range(40)
        )
        assert _peak_tokens(running) == peak


def test_steps_are_bounded_by_the_kv_that_they_will_touch() -> None:
    """Room for 64 × 4 tokens, each request to hold 8 + 40: four fit below 95 %."""
    drive = Drive(running_max=64, step_tokens_max=512)
    drive.submit(*(single(f"r{index}", 8, 40) for index in range(20)))
    running_most = 0
    while drive.step():
        running_most = max(running_most, drive.replica.running_count)
    assert running_most == 4  # 243 tokens, of which each takes 8 + 40 and half a block
    assert drive.replica.stats().preemptions_total == 0
    assert len(drive.ended) == 20


def test_a_groups_prefix_counts_once() -> None:
    drive = Drive(running_max=64, step_tokens_max=512, kv_blocks=32)
    drive.submit(*(member("g", index, shared_len=64, own_len=4, output=4) for index in range(8)))
    drive.step()
    drive.step()
    # 128 tokens: the prefix and 64 x 0.95 left for members of 8 tokens and half a block
    assert drive.replica.running_count >= 4


@pytest.mark.parametrize("step_tokens_max", [64, 512])
def test_what_outputs_really_need_is_learned(step_tokens_max: int) -> None:
    """Allowed 100 and needing 3: once some have ended more of them run at once."""
    drive = Drive(running_max=64, step_tokens_max=step_tokens_max)
    stop = {index: frozenset({expected_output(single(f"r{index}", 8, 3))[-1]}) for index in range(300)}
    requests = [replace(single(f"r{index}", 8, 100), stop_token_ids=stop[index]) for index in range(300)]
    drive.submit(*requests)
    running = []
    while drive.step():
        running.append(drive.replica.running_count)
    assert max(running[:3]) <= 3 < max(running)


def test_a_long_prefill_of_the_batch_does_not_block_an_online_request() -> None:
    drive = Drive(step_tokens_max=8)
    drive.submit(single("bulk", 100, 2, slo_class="batch"))
    drive.step()
    drive.submit(single("chat", 4))
    drive.step()
    assert "chat" in drive.admitted
    drive.run()
    assert drive.ended == ["chat", "bulk"]


# ---- room by memory, on views made by hand ----------------------------------------------------------------


def room_view(*prefilling: Standing, waiting: list[Standing], **fields: int) -> Any:
    """Ten blocks of four tokens, a step of eight, one decode."""
    sizes = {"decoding_count": 1, "step_tokens_max": 8, "block_count": 10, "block_tokens": 4} | fields
    return SimpleNamespace(
        prefilling=list(prefilling),
        waiting=waiting,
        running_count=len(prefilling) + sizes["decoding_count"],
        ranks_before=lambda one, other: one.arrival_index < other.arrival_index,
        **sizes,
    )


def standing(index: int, prompt_len: int, output: int = 12, **fields: int) -> Standing:
    return Standing(Request(f"r{index}", prompt_len, output, 0.0), index, **fields)


def test_who_waits_starts_only_beside_what_the_running_will_grow_to() -> None:
    """Of 38 tokens (the limit, less half a block) the decode takes 20 at its end; a head of 8 + 12 + 2 does
    not fit the 18 that are left, one of 8 + 8 + 2 does."""
    compose = COMPOSE.make("memory-centric", options={"kv_frac": 1.0})
    compose.started(standing(0, 8, output_len=1, is_decoding=True), 0.0)
    assert compose.prefill_room(room_view(waiting=[standing(1, 8)]), 0.0) == 0
    assert compose.prefill_room(room_view(waiting=[standing(1, 8, output=8)]), 0.0) == 7
    assert compose.prefill_room(room_view(waiting=[standing(1, 8)], block_count=11), 0.0) == 7
    assert compose.prefill_room(room_view(waiting=[standing(1, 5)], block_count=11), 0.0) == 5


def test_room_is_what_better_ranked_prompts_leave() -> None:
    compose = COMPOSE.make("memory-centric")
    ahead, behind = standing(0, 20, computed_len=16), standing(9, 20)
    view = room_view(ahead, behind, waiting=[standing(1, 30)], block_count=1000)
    assert compose.prefill_room(view, 0.0) == 3
    view.waiting = []
    assert compose.prefill_room(view, 0.0) == 0, "all that run go first when nobody waits"
