"""Random loads on random replicas: outputs never depend on scheduling, nothing is lost, memory adds up."""

from __future__ import annotations

from dataclasses import dataclass

from fake_executor import FakeExecutor, expected_output, make_replica
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.events import Finished, ReplicaEvent, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request


@dataclass(frozen=True)
class Load:
    requests: list[Request]
    submit_at: list[int]
    cancel_at: dict[str, int]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    requests, cancel_at = [], {}
    for index in range(draw(st.integers(1, 7))):
        # A small alphabet and a few stems make shared prefixes likely.
        stem = [draw(st.integers(0, 1))] * draw(st.integers(0, 14))
        prompt = [*stem, *draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))]
        leader = f"r{draw(st.integers(0, index - 1))}" if index and draw(st.booleans()) else None
        requests.append(
            Request(
                f"r{index}",
                len(prompt),
                draw(st.integers(1, 12)),
                0.0,
                prompt_tokens=prompt,
                stop_token_ids=frozenset(draw(st.sets(st.integers(0, 999), max_size=40))),
                cache_salt=draw(st.sampled_from(["", "", "s"])),
                leader_id=leader,
            )
        )
        if draw(st.integers(0, 4)) == 0:
            cancel_at[f"r{index}"] = draw(st.integers(0, 20))
    submit_at = sorted(draw(st.integers(0, 12)) for _ in requests)
    return Load(requests, submit_at, cancel_at)


systems = st.fixed_dictionaries(
    {
        "kv_blocks": st.integers(9, 24),
        "running_max": st.integers(1, 5),
        "step_tokens_max": st.integers(1, 24),
        "prefix_cache": st.booleans(),
        "compose": st.sampled_from(
            [
                "sarathi",
                "prefill-first",
                "splitfuse",
                "dense-fixed",
                "selective-batching",
                "ms-budget",
            ]
        ),
        "preempt": st.sampled_from(["youngest-recompute", "flush-newest"]),
        "admit": st.sampled_from(["whole-prompt", "aggressive", "conservative", "past-future"]),
    }
)


def drive(load: Load, system: dict[str, object], repeat: bool) -> tuple[list[ReplicaEvent], int]:
    replica = make_replica(repeat=repeat, **system)  # type: ignore[arg-type]
    executor = FakeExecutor(4)
    events: list[ReplicaEvent] = []
    for step in range(2_000):
        for request, due in zip(load.requests, load.submit_at, strict=True):
            if due == step:
                replica.submit(request, float(step))
        for name, due in load.cancel_at.items():
            finished = replica.cancel(name, CancelReason.ADMIN, float(step)) if due == step else None
            events += [finished] if finished else []
        plan = replica.plan(float(step))
        if plan is None and step > 20:
            assert not replica.has_work
            return events, len(executor.plans)
        if plan is not None:
            assert plan.token_count <= max(replica.step_tokens_max, 64)
            events += replica.complete(plan, executor.execute(plan), step + 0.5)
        replica.check_invariants()
    raise AssertionError("the load never finished")


@given(loads(), systems)
@settings(max_examples=250, deadline=None)
def test_outputs_are_right_and_every_request_ends_once(load: Load, system: dict[str, object]) -> None:
    events, _ = drive(load, system, repeat=True)
    finished = [event for event in events if isinstance(event, Finished)]
    assert sorted(event.request_id for event in finished) == sorted(request.id for request in load.requests)
    by_id = {event.request_id: event for event in finished}
    for request in load.requests:
        told = [e.token_id for e in events if isinstance(e, TokenOut) and e.request_id == request.id]
        expected = expected_output(request)
        end = by_id[request.id]
        if end.reason is FinishReason.CANCELLED:
            assert told == expected[: len(told)]
        else:
            assert told == expected
            assert end.output_tokens == len(told) + (end.stop_token_id is not None)


@given(loads(), systems)
@settings(max_examples=150, deadline=None)
def test_standing_plans_change_nothing(load: Load, system: dict[str, object]) -> None:
    assert drive(load, system, repeat=True) == drive(load, system, repeat=False)
