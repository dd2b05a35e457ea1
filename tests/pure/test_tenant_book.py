"""Counts by tenant, and the notice of a preemption storm."""

from __future__ import annotations

from penstock.core.events import Preempted
from penstock.core.reasons import PreemptReason
from penstock.core.request import Request
from penstock.gateway.storms import Storm, StormWatch
from penstock.gateway.tenants import LABELS_MAX, OTHER, OUTPUT, PROMPT, TenantBook


def request(name: str, tenant: str, prompt_len: int = 10) -> Request:
    return Request(name, prompt_len, 50, 0.0, tenant=tenant)


def test_a_request_is_in_one_place_and_leaves_none_behind() -> None:
    book = TenantBook({})
    one, two = request("r1", "a"), request("r2", "a")
    book.entered([one, two])
    assert (book.waiting["a"], book.running["a"]) == (2, 0)
    book.started(one, resumed=False)
    book.token("r1")
    book.preempted("r1")
    assert (book.waiting["a"], book.running["a"]) == (2, 0)
    book.started(one, resumed=True)
    book.started(one, resumed=True)
    book.left("r1")
    book.left("r2")
    book.left("r2")
    assert (book.waiting["a"], book.running["a"]) == (0, 0) and not book._places
    assert book.served == {("a", PROMPT): 10, ("a", OUTPUT): 1}, "a prompt counts once"


def test_tenants_of_the_settings_keep_their_labels() -> None:
    book = TenantBook({"gold": 2.0})
    for index in range(LABELS_MAX + 10):
        book.entered([request(f"r{index}", f"t{index}")])
    book.entered([request("g", "gold")])
    assert book.waiting["gold"] == 1 and book.waiting[OTHER] == 11
    assert len(book.labels) == LABELS_MAX + 1


def test_the_gap_is_between_those_that_wait_and_by_weight() -> None:
    book = TenantBook({"heavy": 4.0})
    for tenant in ("heavy", "light"):
        book.entered([request(f"{tenant}-0", tenant, 100), request(f"{tenant}-1", tenant)])
    assert book.gap_tokens() == 0.0
    for tenant in ("heavy", "light"):
        book.started(request(f"{tenant}-0", tenant, 100), resumed=False)
    assert book.gap_tokens() == 75.0, "100 tokens, less 100 at a weight of four"
    book.entered([request("new-0", "new")])
    assert book.gap_tokens() == 75.0, "who comes starts with the least"
    book.left("light-1")
    assert book.gap_tokens() == 0.0, "who has nothing waiting is not compared"


def preempted(name: str, lost: int, winner: str = "boss") -> Preempted:
    return Preempted(name, 0.0, PreemptReason.OUTRANKED, lost, winner)


def steps(watch: StormWatch, first: int, count: int, tokens: int, now_s: float) -> list[Storm]:
    found = (watch.reported(index, tokens, now_s + 0.01 * index) for index in range(first, first + count))
    return [storm for storm in found if storm is not None]


def test_a_storm_is_told_once_with_victim_and_cause() -> None:
    watch = StormWatch()
    for index in range(12):
        watch.preempted(preempted("often" if index % 2 else f"r{index}", 100), 1.0)
    storms = steps(watch, 0, 5, 500, 1.0)
    assert len(storms) == 1
    storm = storms[0]
    assert (storm.victim, storm.victim_times, storm.cause, storm.for_whom) == (
        "often",
        6,
        "outranked",
        "boss",
    )
    assert storm.tokens_lost == 1200 and "most often often (6 times)" in str(storm)
    assert not steps(watch, 5, 5, 500, 1.0)
    assert not steps(watch, 10, 5, 500, 30.0), "the window has passed"
    for _ in range(12):
        watch.preempted(preempted("again", 100), 40.0)
    assert len(steps(watch, 20, 5, 500, 40.0)) == 1


def test_few_preemptions_or_little_loss_are_no_storm() -> None:
    watch = StormWatch()
    for _ in range(5):
        watch.preempted(preempted("r", 1000), 0.0)
    assert not steps(watch, 0, 3, 500, 0.0)
    watch = StormWatch()
    for _ in range(50):
        watch.preempted(preempted("r", 1), 0.0)
    assert not steps(watch, 0, 3, 500, 0.0)


def test_the_same_step_counts_once() -> None:
    watch = StormWatch()
    for _ in range(12):
        watch.preempted(preempted("r", 10), 0.0)
    assert watch.reported(7, 500, 0.0) is not None
    assert watch.reported(7, 500, 0.0) is None and watch._computed_tokens == 500
