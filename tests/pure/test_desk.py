"""The desk's decisions on hand-made lines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.core.errors import (
    ConcurrencyLimitExceeded,
    ContextLengthExceeded,
    Overloaded,
    RequestExceedsCapacity,
)
from penstock.core.reasons import ShedReason
from penstock.core.request import Request
from penstock.core.settings import DeskSettings
from penstock.desk import Capacity, Desk, fit_output
from penstock.desk.desk import RETRY_AFTER_S_MAX, RETRY_AFTER_S_MIN

CAPACITY = Capacity(context_len_max=100, kv_block_tokens=16, kv_blocks=4, running_max=2)


def make_request(name: str, *, tokens: int = 10, tenant: str = "default", priority: int = 0) -> Request:
    return Request(
        id=name,
        prompt_len=tokens,
        max_output_tokens=1,
        arrival_s=float(int(name)),
        tenant=tenant,
        priority=priority,
    )


def make_desk(**settings: float) -> Desk:
    return Desk(DeskSettings(**{"engine_ahead": 0, **settings}), CAPACITY)  # type: ignore[arg-type]


def fill(desk: Desk, count: int, first: int = 0) -> list[str]:
    """Enter `count` requests and release what fits; returns the ids released."""
    for number in range(first, first + count):
        desk.enter([make_request(str(number))])
    return [request.id for request in desk.release()]


def test_the_engine_window_is_filled_in_order_of_arrival() -> None:
    desk = make_desk()
    assert fill(desk, 4) == ["0", "1"]
    desk.finish("0", now_s=1.0)
    assert [request.id for request in desk.release()] == ["2"]
    desk.check_invariants()


def test_a_lower_priority_value_goes_first() -> None:
    desk = make_desk()
    desk.enter([make_request("0", priority=5), make_request("1", priority=0), make_request("2", priority=-1)])
    assert [request.id for request in desk.release()] == ["2", "1"]


def test_a_full_line_refuses_with_a_reason_and_a_delay() -> None:
    desk = make_desk(queue_requests_max=1)
    fill(desk, 3)
    with pytest.raises(Overloaded) as refused:
        desk.enter([make_request("9")])
    assert refused.value.reason is ShedReason.QUEUE_REQUESTS
    assert refused.value.retry_after_s == RETRY_AFTER_S_MIN
    assert desk.waiting_count == 1


def test_too_many_waiting_tokens_refuse_but_one_large_request_may_always_wait() -> None:
    desk = make_desk(queue_tokens_max=50)
    fill(desk, 2)
    desk.enter([make_request("3", tokens=60)])
    with pytest.raises(Overloaded) as refused:
        desk.enter([make_request("4", tokens=1)])
    assert refused.value.reason is ShedReason.QUEUE_TOKENS


def test_the_expected_wait_is_measured_only_while_somebody_waits() -> None:
    desk = make_desk(queue_wait_s_max=30.0)
    fill(desk, 2)
    for number in range(20):  # nobody waits: finishes a minute apart say nothing about our speed
        desk.finish(str(number), now_s=60.0 * number)
        fill(desk, 1, first=number + 2)
    assert desk.expected_wait_s(1) is None
    now_s = 1200.0
    fill(desk, 12, first=22)
    for number in range(20, 31):
        desk.finish(str(number), now_s)
        desk.release()
        now_s += 20.0
    assert desk.expected_wait_s(1) == pytest.approx(20.0)
    with pytest.raises(Overloaded) as refused:  # one waits already, so a newcomer would wait 40 s
        fill(desk, 1, first=100)
    assert refused.value.reason is ShedReason.QUEUE_WAIT
    assert refused.value.retry_after_s == pytest.approx(20.0)


def test_the_delay_told_is_bounded() -> None:
    desk = make_desk(queue_requests_max=40, queue_wait_s_max=1e9)
    fill(desk, 42)
    for number in range(12):
        desk.finish(str(number), now_s=1000.0 * number)
        desk.release()
    fill(desk, 12, first=50)
    with pytest.raises(Overloaded) as refused:
        desk.enter([make_request("99")])
    assert refused.value.retry_after_s == RETRY_AFTER_S_MAX


def test_one_tenant_at_its_cap_does_not_keep_another_out() -> None:
    desk = make_desk(tenant_requests_max=1)
    desk.enter([make_request("0", tenant="a")])
    with pytest.raises(ConcurrencyLimitExceeded) as refused:
        desk.enter([make_request("1", tenant="a")])
    assert refused.value.reason is ShedReason.TENANT_CONCURRENCY
    desk.enter([make_request("2", tenant="b")])
    desk.release()
    desk.finish("0", now_s=0.0)
    desk.enter([make_request("3", tenant="a")])
    desk.check_invariants()


def test_a_call_that_could_never_enter_is_not_told_to_retry() -> None:
    desk = make_desk(queue_requests_max=1)
    with pytest.raises(RequestExceedsCapacity) as refused:
        desk.enter([make_request(str(number)) for number in range(4)])
    assert refused.value.param == "n" and not refused.value.retryable
    assert desk.waiting_count == 0


def test_cancel_reaches_only_those_who_wait() -> None:
    desk = make_desk()
    fill(desk, 3)
    assert not desk.cancel("0") and not desk.cancel("nobody")
    assert desk.cancel("2") and not desk.cancel("2")
    assert desk.waiting_count == 0 and desk.inside_count == 2
    desk.check_invariants()


def test_cancelled_requests_leave_no_trace_in_memory() -> None:
    desk = make_desk(queue_requests_max=5000)
    fill(desk, 3)
    for number in range(10, 2010):
        desk.enter([make_request(str(number))])
        desk.cancel(str(number))
        desk.check_invariants()


def test_when_the_engine_dies_everybody_leaves_once() -> None:
    desk = make_desk()
    fill(desk, 5)
    assert sorted(request.id for request in desk.clear()) == ["0", "1", "2", "3", "4"]
    assert desk.clear() == [] and desk.release() == []
    desk.check_invariants()


def fit(prompt_len: int, asked_tokens: int | None, capacity: Capacity = CAPACITY) -> int:
    return fit_output(
        prompt_len, asked_tokens, capacity, prompt_param="messages", output_param="max_completion_tokens"
    )


def test_absent_max_tokens_fills_what_context_and_kv_hold() -> None:
    assert fit(10, None) == 55  # 64 tokens of KV; the last output token needs none
    roomy = Capacity(context_len_max=100, kv_block_tokens=16, kv_blocks=100, running_max=2)
    assert fit(10, None, roomy) == 90


@pytest.mark.parametrize(
    ("prompt_len", "asked", "error", "param"),
    [
        (100, 1, ContextLengthExceeded, "messages"),
        (100, None, ContextLengthExceeded, "messages"),
        (65, 1, RequestExceedsCapacity, "messages"),
        (40, 61, ContextLengthExceeded, "max_completion_tokens"),
        (40, 26, RequestExceedsCapacity, "max_completion_tokens"),
    ],
)
def test_what_can_never_run_is_refused_by_name(
    prompt_len: int, asked: int | None, error: type[ContextLengthExceeded], param: str
) -> None:
    with pytest.raises(error) as refused:
        fit(prompt_len, asked)
    assert refused.value.param == param and refused.value.hint


def test_the_largest_request_that_fits_is_let_in() -> None:
    assert fit(40, 25) == 25
    assert fit(64, 1) == 1


# ---- an engine that takes the whole queue -----------------------------------------------------------------

SORTING = Capacity(context_len_max=100, kv_block_tokens=16, kv_blocks=100, running_max=2, takes_queue=True)


def sorting_desk(**settings: float) -> Desk:
    return Desk(DeskSettings(**{"engine_ahead": 0, **settings}), SORTING)  # type: ignore[arg-type]


def test_an_engine_that_reorders_sees_everybody() -> None:
    desk = sorting_desk(queue_requests_max=5)
    assert desk.queued == (0, 0) and fill(desk, 7) == [str(number) for number in range(7)]
    assert desk.queued[0] == 5 and not desk.waiting_count
    desk.check_invariants()


def test_what_stands_in_the_engine_is_bounded_as_a_line_is() -> None:
    desk = sorting_desk(queue_requests_max=5)
    fill(desk, 7)
    with pytest.raises(Overloaded) as caught:
        desk.enter([make_request("7")])
    assert caught.value.reason is ShedReason.QUEUE_REQUESTS
    desk = sorting_desk(queue_tokens_max=35)
    fill(desk, 3)
    fill(desk, 2, first=3)
    with pytest.raises(Overloaded) as caught:
        desk.enter([make_request("5")])
    assert caught.value.reason is ShedReason.QUEUE_TOKENS and "30 tokens" in caught.value.message
    desk.finish("0", 1.0)
    desk.enter([make_request("6")])
    with pytest.raises(RequestExceedsCapacity):
        sorting_desk(queue_requests_max=1).enter([make_request(str(number)) for number in range(4)])


def test_work_that_can_wait_leaves_room_for_who_cannot() -> None:
    desk = Desk(DeskSettings(tenant_requests_max=10), replace(CAPACITY, running_max=16))
    entered = 0
    while desk.has_spare_room("bulk"):
        desk.enter([make_request(str(entered), tenant="bulk")])
        desk.release()
        entered += 1
    assert entered == 5  # half of the tenant's places
    while desk.has_spare_room(f"bulk{entered}"):
        desk.enter([make_request(str(entered), tenant=f"bulk{entered}")])
        desk.release()
        entered += 1
    assert entered == 14  # an eighth of the slots stays free
    for number in range(entered, entered + 11):
        desk.enter([make_request(str(number), tenant=f"t{number}")])
    desk.release()
    assert desk.waiting_count and not desk.has_spare_room("late")


def test_somebody_always_finds_spare_room_in_an_idle_desk() -> None:
    for slots in (1, 2, 7):
        desk = Desk(DeskSettings(tenant_requests_max=1), replace(CAPACITY, running_max=slots))
        assert desk.has_spare_room("bulk")
