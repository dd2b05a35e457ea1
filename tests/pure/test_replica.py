"""The step loop on hand-made cases: what is planned, why something waits, who yields."""

from __future__ import annotations

import pytest
from fake_executor import FakeExecutor, expected_output, make_replica

from penstock.core.errors import ContextLengthExceeded, RequestExceedsCapacity
from penstock.core.events import Admitted, Finished, Preempted, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request, SamplingParams
from penstock.replica.replica import Replica


def request(name: str, prompt_len: int = 6, output: int = 3, **fields: object) -> Request:
    tokens = fields.pop("prompt_tokens", None) or [hash_token(name, i) for i in range(prompt_len)]
    return Request(name, len(tokens), output, 0.0, prompt_tokens=tokens, **fields)  # type: ignore[arg-type]


def hash_token(name: str, index: int) -> int:
    return (sum(name.encode()) * 31 + index * 7) % 1000


def run(replica: Replica, executor: FakeExecutor, steps: int = 10_000, now_s: float = 0.0) -> list[object]:
    events: list[object] = []
    for _ in range(steps):
        plan = replica.plan(now_s)
        if plan is None:
            break
        replica.check_invariants()
        now_s += 1.0
        events += replica.complete(plan, executor.execute(plan), now_s)
        replica.check_invariants()
    return events


def outputs(events: list[object]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        if isinstance(event, TokenOut):
            found.setdefault(event.request_id, []).append(event.token_id)
    return found


def test_one_request_runs_to_its_length() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    asked = request("a")
    replica.submit(asked, 0.0)
    events = run(replica, executor)
    assert outputs(events) == {"a": expected_output(asked)}
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.prompt_tokens, finished.output_tokens) == (FinishReason.LENGTH, 6, 3)
    assert not replica.has_work and replica.plan(9.0) is None
    assert replica.stats().kv_blocks_used == 0


def test_stop_token_ends_the_output_is_counted_and_not_told() -> None:
    plain = request("a", output=5)
    stop = expected_output(plain)[2]
    replica, executor = make_replica(), FakeExecutor(4)
    replica.submit(request("a", output=5, stop_token_ids=frozenset({stop})), 0.0)
    events = run(replica, executor)
    assert outputs(events)["a"] == expected_output(plain)[:2]
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, events[-1].stop_token_id, events[-1].output_tokens) == (
        FinishReason.STOP,
        stop,
        3,
    )


def test_sarathi_mixes_chunks_with_decodes_within_the_budget() -> None:
    replica, executor = make_replica(step_tokens_max=8), FakeExecutor(4)
    replica.submit(request("a", 6, 20), 0.0)
    run(replica, executor, steps=1)
    replica.submit(request("long", 30, 2), 1.0)
    run(replica, executor, steps=5, now_s=1.0)
    mixed = executor.plans[1:6]
    assert [plan.decode_count for plan in mixed] == [1] * 5
    assert [[chunk.count for chunk in plan.chunks] for plan in mixed] == [[7], [7], [7], [7], [2]]
    assert [plan.chunks[0].emits for plan in mixed] == [False, False, False, False, True]


def test_prefill_first_pauses_decodes_for_a_whole_prompt() -> None:
    replica = make_replica(step_tokens_max=8, compose="prefill-first")
    executor = FakeExecutor(4)
    replica.submit(request("a", 6, 20), 0.0)
    run(replica, executor, steps=2)
    replica.submit(request("long", 30, 2), 1.0)
    run(replica, executor, steps=1, now_s=2.0)
    assert [chunk.count for chunk in executor.plans[-1].chunks] == [30]
    assert executor.plans[-1].decode_count == 0


def test_shared_prefix_is_computed_once() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    shared = list(range(12))
    replica.submit(request("a", prompt_tokens=[*shared, 100, 101]), 0.0)
    run(replica, executor)
    replica.submit(request("b", prompt_tokens=[*shared, 200, 201]), 9.0)
    events = run(replica, executor, now_s=9.0)
    admitted = next(event for event in events if isinstance(event, Admitted))
    assert admitted.cached_len == 12
    stats = replica.stats()
    assert stats.prefix_hit_tokens_total == 12
    assert stats.prefix_query_tokens_total == 28


def test_a_fully_cached_prompt_still_computes_one_token() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    for name in ("a", "b"):
        replica.submit(request(name, prompt_tokens=list(range(8))), 0.0)
        events = run(replica, executor)
        assert outputs(events)[name] == expected_output(request(name, prompt_tokens=list(range(8))))
    assert replica.stats().prefix_hit_tokens_total == 4


def test_different_salts_do_not_share() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    for salt in ("x", "y", "x"):
        replica.submit(request(f"r-{salt}", prompt_tokens=list(range(9)), cache_salt=salt), 0.0)
        run(replica, executor)
    assert replica.stats().prefix_hit_tokens_total == 8


def test_scoring_the_prompt_uses_no_cache() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    sampling = SamplingParams(logprobs=1, prompt_logprobs=True)
    for name in ("a", "b"):
        replica.submit(request(name, prompt_tokens=list(range(9)), sampling=sampling), 0.0)
        run(replica, executor)
    assert replica.stats().prefix_hit_tokens_total == 0


def test_siblings_wait_for_their_leader_then_share_its_prompt() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    prompt = list(range(17))
    for index in range(3):
        leader = None if index == 0 else "c-0"
        replica.submit(request(f"c-{index}", prompt_tokens=prompt, leader_id=leader), 0.0)
    events = run(replica, executor)
    cached = {event.request_id: event.cached_len for event in events if isinstance(event, Admitted)}
    assert cached == {"c-0": 0, "c-1": 16, "c-2": 16}


def test_a_sibling_of_a_cancelled_leader_goes_on_alone() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    replica.submit(request("c-0", prompt_tokens=list(range(9))), 0.0)
    replica.submit(request("c-1", prompt_tokens=list(range(9)), leader_id="c-0"), 0.0)
    assert replica.cancel("c-0", CancelReason.ADMIN, 0.0) is not None
    assert outputs(run(replica, executor)).keys() == {"c-1"}


def test_slots_bound_what_runs_and_the_reason_is_told() -> None:
    replica, executor = make_replica(running_max=1), FakeExecutor(4)
    for name in ("a", "b", "c"):
        replica.submit(request(name, output=4), 0.0)
    run(replica, executor, steps=2)
    stats = replica.stats()
    assert (stats.running, stats.waiting) == (1, 2)
    assert stats.waiting_by_reason == {"slots": 1, "behind_head": 1}


def test_memory_pressure_preempts_the_youngest_and_loses_nothing() -> None:
    replica, executor = make_replica(kv_blocks=8), FakeExecutor(4)
    asked = [request(name, 8, 14) for name in ("a", "b")]
    for one in asked:
        replica.submit(one, 0.0)
    events = run(replica, executor)
    preempted = [event for event in events if isinstance(event, Preempted)]
    assert preempted and {event.request_id for event in preempted} == {"b"}
    assert {event.for_request_id for event in preempted} <= {"a", "b"}
    assert outputs(events) == {one.id: expected_output(one) for one in asked}
    finished = {event.request_id: event for event in events if isinstance(event, Finished)}
    assert finished["b"].phases.preempted_s > 0
    for one in finished.values():
        assert one.phases.total_s == one.at_s


def test_the_head_that_does_not_fit_is_not_overtaken() -> None:
    replica, executor = make_replica(kv_blocks=8), FakeExecutor(4)
    replica.submit(request("a", 16, 8), 0.0)
    run(replica, executor, steps=1)
    replica.submit(request("big", 24, 2), 1.0)
    replica.submit(request("small", 2, 2), 1.0)
    run(replica, executor, steps=2, now_s=1.0)
    assert replica.stats().waiting_by_reason == {"kv_capacity": 1, "behind_head": 1}


@pytest.mark.parametrize("prompt_len", [20, 21, 22, 29, 30, 31, 32, 33])
def test_sizes_near_capacity_are_refused_at_the_door_or_finish(prompt_len: int) -> None:
    replica, executor = make_replica(kv_blocks=8, context_len_max=36), FakeExecutor(4)
    asked = request("a", prompt_len, 3)
    if prompt_len + 2 > 32:
        with pytest.raises(RequestExceedsCapacity):
            replica.submit(asked, 0.0)
        return
    replica.submit(asked, 0.0)
    assert outputs(run(replica, executor)) == {"a": expected_output(asked)}


def test_a_request_beyond_the_context_is_refused() -> None:
    with pytest.raises(ContextLengthExceeded, match="context is 36"):
        make_replica(context_len_max=36).submit(request("a", 35, 2), 0.0)


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_cancel_frees_everything_at_once(steps_before: int) -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    replica.submit(request("a", 6, 50), 0.0)
    run(replica, executor, steps=steps_before)
    finished = replica.cancel("a", CancelReason.CLIENT_DISCONNECT, 5.0)
    assert finished is not None and finished.reason is FinishReason.CANCELLED
    assert replica.stats().kv_blocks_used == 0 and not replica.has_work
    replica.check_invariants()
    assert replica.cancel("a", CancelReason.CLIENT_DISCONNECT, 5.0) is None


def test_cancel_while_the_step_runs() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    for name in ("a", "b"):
        replica.submit(request(name), 0.0)
    plan = replica.plan(0.0)
    assert plan is not None
    replica.cancel("a", CancelReason.ADMIN, 0.5)
    events = replica.complete(plan, executor.execute(plan), 1.0)
    assert outputs(events).keys() == {"b"}
    assert {event.request_id for event in events} == {"b"}, "the cancel was the last word on it"
    assert outputs(run(replica, executor, now_s=1.0)).keys() == {"b"}


def test_a_cancelled_head_holds_up_nobody_behind_a_standing_plan() -> None:
    replica, executor = make_replica(kv_blocks=10), FakeExecutor(4)
    for asked in (request("runs", 6, 20), request("too-big-now", 36, 1), request("small", 4, 1)):
        replica.submit(asked, 0.0)
    run(replica, executor, steps=3)
    assert executor.plans[-1].repeat > 1 and replica.stats().waiting == 2
    replica.cancel("too-big-now", CancelReason.ADMIN, 3.0)
    assert outputs(run(replica, executor, steps=1, now_s=3.0)).keys() == {"runs", "small"}


def test_a_broken_executor_answers_everything() -> None:
    replica, executor = make_replica(running_max=1), FakeExecutor(4)
    for name in ("a", "b"):
        replica.submit(request(name, 6, 9), 0.0)
    run(replica, executor, steps=2)
    replica.plan(2.0)
    failed = replica.fail_all("out of memory", 3.0)
    assert {event.request_id for event in failed} == {"a", "b"}
    assert {event.reason for event in failed} == {FinishReason.FAILED}
    assert not replica.has_work
    replica.check_invariants()


def test_evicted_prefixes_are_told_from_new_ones() -> None:
    replica, executor = make_replica(kv_blocks=8), FakeExecutor(4)
    first, other = list(range(20)), list(range(500, 528))
    for name, prompt in (("a", first), ("b", other), ("c", first)):
        replica.submit(request(name, prompt_tokens=prompt, output=2), 0.0)
        run(replica, executor)
    assert replica.stats().prefix_miss_tokens_total["evicted"] > 0


def test_a_decode_plan_stands_until_a_certain_finish() -> None:
    replica, executor = make_replica(), FakeExecutor(4)
    replica.submit(request("a", 5, 9), 0.0)
    run(replica, executor)
    assert [plan.repeat for plan in executor.plans] == [1, 8, 7, 6, 5, 4, 3, 2, 1]


def test_where_a_step_was_for_one_that_yields_the_others_have_it() -> None:
    """A cut prompt goes on first, finds no block, and ranks last: who came later and ranks before goes on."""
    replica = make_replica(
        kv_blocks=6,
        step_tokens_max=8,
        prefix_cache=False,
        rank="shortest-prompt-aged",
        admit="aggressive",
        compose="dense-fixed",
    )
    executor = FakeExecutor(4)
    replica.submit(Request("long", 17, 2, 0.0, prompt_tokens=[1] * 17), 0.0)
    for _ in range(2):
        plan = replica.plan(0.0)
        assert plan is not None
        replica.complete(plan, executor.execute(plan), 0.0)
    replica.submit(Request("short", 9, 2, 0.0, prompt_tokens=[2] * 9), 0.0)
    plan = replica.plan(0.0)
    assert plan is not None
    assert [start.request_id for start in plan.starts] == ["short"]
    assert [chunk.count for chunk in plan.chunks] == [8]
    assert replica.stats().preemptions_total == 1
