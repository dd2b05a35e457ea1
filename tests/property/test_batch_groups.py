"""Random jobs with groups, under every mix of BatchLLM's policies and others: outputs are right, nothing is
lost, standing plans change nothing, and the twin makes the live replica's plans."""

from __future__ import annotations

from fake_executor import FakeExecutor, expected_output, make_replica
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished, ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.replica.replica import Replica

BLOCK = 4


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Request], list[int], dict[str, int]]:
    """Requests, the step each is submitted at, and the step some are cancelled at.

    Hints may lie: a `shared_len` beyond what a group really has in common must not break anything.
    """
    stems, shared_lens = ([8], [8]) if draw(st.booleans()) else ([8, 8, 8, 5], [8, 8, 8, 12, 3, 100])
    requests, cancel_at = [], {}
    for index in range(draw(st.integers(1, 9))):
        group = draw(st.sampled_from([None, "g", "h"]))
        own = draw(st.lists(st.integers(0, 3), max_size=8))
        stem = [] if group is None else [ord(group)] * draw(st.sampled_from(stems))
        prompt = [*stem, *own] or [1]
        requests.append(
            Request(
                f"r{index}",
                len(prompt),
                draw(st.integers(1, 10)),
                0.0,
                prompt_tokens=prompt,
                stop_token_ids=frozenset(draw(st.sets(st.integers(0, 999), max_size=30))),
                slo_class=draw(st.sampled_from(["batch", "batch", "default"])),
                group_id=group,
                shared_len=0 if group is None else draw(st.sampled_from(shared_lens)),
            )
        )
        if draw(st.integers(0, 5)) == 0:
            cancel_at[f"r{index}"] = draw(st.integers(0, 20))
    return requests, sorted(draw(st.integers(0, 8)) for _ in requests), cancel_at


systems = st.fixed_dictionaries(
    {
        "kv_blocks": st.integers(8, 24),
        "running_max": st.integers(1, 9),
        "step_tokens_max": st.integers(1, 24),
        "prefix_cache": st.sampled_from([True, True, False]),
        "rank": st.sampled_from(["prefix-group", "prefix-group", "fcfs"]),
        "compose": st.sampled_from(["memory-centric", "memory-centric", "sarathi", "prefill-first"]),
        "retain": st.sampled_from(["prefix-lifetime", "prefix-lifetime", "lru"]),
    }
)


def is_honest(request: Request) -> bool:
    return (
        request.shared_len == 8
        and list(request.prompt_tokens or ())[:8] == [ord(request.group_id or "-")] * 8
    )


def no_two_compute_one_prefix(replica: Replica, requests: list[Request]) -> None:
    """Of a group whose hints are true, at most one running member is still within the shared part."""
    for group in "gh":
        if not all(is_honest(request) for request in requests if request.group_id == group):
            continue
        within = [
            sequence
            for sequence in replica.running
            if sequence.request.group_id == group
            and sequence.computed_len < min(8, sequence.request.prompt_len - 1) // BLOCK * BLOCK
        ]
        assert len(within) <= 1


def drive(
    job: tuple[list[Request], list[int], dict[str, int]], system: dict[str, object], repeat: bool
) -> list[ReplicaEvent]:
    requests, submit_at, cancel_at = job
    replica = make_replica(repeat=repeat, **system)  # type: ignore[arg-type]
    executor = FakeExecutor(BLOCK)
    events: list[ReplicaEvent] = []
    for step in range(2_000):
        for request, due in zip(requests, submit_at, strict=True):
            if due == step:
                replica.submit(request, float(step))
        for name, due in cancel_at.items():
            finished = replica.cancel(name, CancelReason.ADMIN, float(step)) if due == step else None
            events += [finished] if finished else []
        plan = replica.plan(float(step))
        if plan is None and step > 20:
            assert not replica.has_work
            assert not replica._group_leaders._leaders
            return events
        if plan is not None:
            if system["prefix_cache"]:
                no_two_compute_one_prefix(replica, requests)
            events += replica.complete(plan, executor.execute(plan), step + 0.5)
        replica.check_invariants()
    raise AssertionError("the job never finished")


@given(jobs(), systems)
@settings(max_examples=300, deadline=None)
def test_outputs_are_right_and_every_request_ends_once(
    job: tuple[list[Request], list[int], dict[str, int]], system: dict[str, object]
) -> None:
    events = drive(job, system, repeat=True)
    by_id = {event.request_id: event for event in events if isinstance(event, Finished)}
    assert sorted(e.request_id for e in events if isinstance(e, Finished)) == sorted(r.id for r in job[0])
    for request in job[0]:
        told = [e.token_id for e in events if isinstance(e, TokenOut) and e.request_id == request.id]
        expected = expected_output(request)
        if by_id[request.id].reason is FinishReason.CANCELLED:
            expected = expected[: len(told)]
        assert told == expected


@given(jobs(), systems)
@settings(max_examples=200, deadline=None)
def test_standing_plans_change_nothing(
    job: tuple[list[Request], list[int], dict[str, int]], system: dict[str, object]
) -> None:
    assert drive(job, system, repeat=True) == drive(job, system, repeat=False)
