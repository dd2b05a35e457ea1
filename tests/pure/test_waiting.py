"""The queue of a replica: always in the rank's order, whether one line or a line a tenant."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.request import Request
from penstock.policies.rank import Rank, RankKey
from penstock.policies.view import SequenceView
from penstock.replica.sequence import Sequence
from penstock.replica.waiting import WaitingQueue


class ByTenant(Rank):
    """Tenants in an order that a test shuffles, the shorter prompt first within each."""

    def __init__(self) -> None:
        self.places = {"a": 0, "b": 1, "c": 2}
        self.number = 0

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (self.places[sequence.request.tenant], sequence.request.prompt_len)

    def version(self, now_s: float) -> int:
        return self.number


class InLines(ByTenant):
    """The same, and says so."""

    orders_tenants = True


moves = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 4)),
        st.tuples(st.just("remove"), st.integers(0, 30), st.none()),
        st.tuples(st.just("shuffle"), st.permutations("abc"), st.none()),
    ),
    max_size=40,
)


@given(moves)
@settings(max_examples=200, deadline=None)
def test_lines_of_tenants_are_in_the_order_of_one_line(told: list[tuple[str, object, object]]) -> None:
    ranks = (ByTenant(), InLines())
    queues = [WaitingQueue(rank) for rank in ranks]
    inside: list[Sequence] = []
    for number, (move, first, second) in enumerate(told):
        if move == "add":
            program = "p" if number % 3 == 0 else None
            request = Request(f"r{number}", int(second), 1, 0.0, tenant=str(first), program_id=program)  # type: ignore[call-overload]
            inside.append(Sequence(number, request, 0.0))
            for queue in queues:
                queue.add(inside[-1], 0.0)
        elif move == "remove" and inside:
            gone = inside.pop(int(first) % len(inside))  # type: ignore[call-overload]
            for queue in queues:
                queue.remove(gone)
        elif move == "shuffle":
            for rank, queue in zip(ranks, queues, strict=True):
                rank.places = {tenant: place for place, tenant in enumerate(first)}  # type: ignore[arg-type]
                rank.number += 1
                queue.refresh(0.0)
        plain, lines = queues
        assert list(plain) == list(lines) == [lines.at(place) for place in range(len(lines))]
        assert len(lines) == len(inside) and lines.total_tokens == sum(each.total_len for each in inside)
        assert list(lines) == sorted(inside, key=lambda each: (*ranks[0].key(each, 0.0), each.arrival_index))
        for tenant in "abc":
            waits = any(each.request.program == (tenant, "p") for each in inside)
            assert lines.has_turn_of((tenant, "p")) == waits
