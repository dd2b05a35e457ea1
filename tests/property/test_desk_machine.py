"""Whatever happens at the desk, in any order: nobody is lost, nobody leaves twice, every bound holds."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.errors import ConcurrencyLimitExceeded, Overloaded
from penstock.core.request import Request
from penstock.core.settings import DeskSettings
from penstock.desk import Capacity, Desk

SETTINGS = DeskSettings(
    queue_requests_max=6, queue_tokens_max=200, queue_wait_s_max=20.0, tenant_requests_max=8, engine_ahead=1
)
CAPACITY = Capacity(context_len_max=100, kv_block_tokens=16, kv_blocks=64, running_max=2)


class DeskMachine(RuleBasedStateMachine):
    """A plain model (three sets of ids) beside the desk."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(SETTINGS, CAPACITY)
        self.now_s = 0.0
        self.count = 0
        self.waiting: dict[str, Request] = {}
        self.inside: set[str] = set()

    @rule(
        choices=st.integers(1, 4),
        tokens=st.integers(1, 60),
        tenant=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
    )
    def enter(self, choices: int, tokens: int, tenant: str, priority: int) -> None:
        group = [self._make_request(tokens, tenant, priority) for _ in range(choices)]
        try:
            self.desk.enter(group)
        except (Overloaded, ConcurrencyLimitExceeded) as refused:
            assert refused.retry_after_s is not None and refused.reason is not None
            assert self.waiting or self.inside, "an idle desk refuses nobody"
        else:
            self.waiting.update({request.id: request for request in group})

    @rule()
    def release(self) -> None:
        released = self.desk.release()
        for request in released:
            del self.waiting[request.id]
            self.inside.add(request.id)
        assert released == sorted(released, key=lambda request: (request.priority, request.arrival_s))
        assert not self.waiting or len(self.inside) == self.desk.engine_window, "no place is left empty"

    @precondition(lambda self: self.waiting or self.inside)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted({*self.waiting, *self.inside})))
        assert self.desk.cancel(request_id) is (request_id in self.waiting)
        self.waiting.pop(request_id, None)

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), elapsed_s=st.floats(0, 30))
    def finish(self, data: st.DataObject, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        request_id = data.draw(st.sampled_from(sorted(self.inside)))
        self.desk.finish(request_id, self.now_s)
        self.inside.remove(request_id)

    @rule()
    def engine_dies(self) -> None:
        assert {request.id for request in self.desk.clear()} == {*self.waiting, *self.inside}
        self.waiting.clear()
        self.inside.clear()

    @invariant()
    def books_agree(self) -> None:
        self.desk.check_invariants()
        assert self.desk.waiting_count == len(self.waiting) and self.desk.inside_count == len(self.inside)
        assert self.desk.waiting_count <= SETTINGS.queue_requests_max + self.desk.engine_window

    def _make_request(self, tokens: int, tenant: str, priority: int) -> Request:
        self.count += 1
        return Request(
            id=f"r{self.count:05d}",
            prompt_len=tokens,
            max_output_tokens=2,
            arrival_s=float(self.count),
            tenant=tenant,
            priority=priority,
        )


TestDesk = DeskMachine.TestCase
TestDesk.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
