"""Virtual token counters: the tenant that was served least goes first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from penstock.core.reasons import FinishReason
from penstock.core.settings import setting
from penstock.policies.base import FOREVER
from penstock.policies.context import Context
from penstock.policies.rank import RANK, Rank, RankKey
from penstock.policies.view import ReplicaView, SequenceView, StepFacts

IDLE_TENANTS_MAX: Final = 4096  # counters kept of tenants that have nothing here
_LAST: Final = 1 << 32  # the place of a tenant until the order is made again


@dataclass(frozen=True, slots=True)
class VtcOptions:
    input_weight: float = setting(1.0, "service of one prompt token", low=0.0, high=1e6)
    output_weight: float = setting(2.0, "service of one output token", low=1e-6, high=1e6)
    swap_margin_tokens: float = setting(
        4096.0, "a waiting tenant displaces running work only when it is so far behind", low=0.0, high=1e12
    )


@dataclass(slots=True, eq=False)
class _Tenant:
    """Service received: what is settled, and one token a step for each sequence that decodes."""

    weight: float
    number: int  # in order of first sight; breaks ties
    prompt_tokens: int = 0
    output_tokens: int = 0  # of sequences' decodes that have ended, and of those that run as they began
    lifted: float = 0.0  # counter units that it was lifted by
    decoding: int = 0
    joined: int = 0  # the sum of the clocks at which they began
    waiting: int = 0
    inside: int = 0
    place: int = 0  # in the order


@dataclass(slots=True)
class _Decode:
    output_len: int  # when it began
    clock: int


@RANK.register("vtc", source="Fairness in Serving Large Language Models (OSDI 2024), algorithm 2")
class VirtualTokenCounters(Rank):
    """The tenant with the smallest counter of weighted tokens goes first; arrival order within a tenant.

    A prompt is charged when it is first admitted, output as it is generated, both divided by the tenant's
    weight; work done again after a preemption is not charged. A tenant that comes back is lifted to the
    smallest counter among those that wait (to the counter of whoever left last where nobody waits), so that
    idling saves up nothing. Two tenants that both wait all the time differ by at most
    2·max(input_weight·longest prompt, output_weight·tokens that fit the KV). The counters advance every step;
    keys are places in their order, so that a step costs O(tenants present). Sequences that `compose` pauses
    are charged as if they went on, and settled when they leave.
    """

    Options = VtcOptions
    orders_tenants = True

    def __init__(self, context: Context, options: VtcOptions) -> None:
        self._weight_of = context.terms.weight
        self._options = options
        self._tenants: dict[str, _Tenant] = {}  # who has something here
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()  # least recently here first
        self._seen = 0
        self._order: list[_Tenant] = []
        self._is_stale = False
        self._version = 0
        self._clock = 0  # decode steps told by `stepped`
        self._decodes: dict[int, _Decode] = {}  # by arrival index
        self._joining: dict[int, SequenceView] = {}  # began to decode in the step that is being told
        self._charged: set[int] = set()  # prompts, by arrival index
        self._left_last: _Tenant | None = None  # who last had nobody waiting any more
        self._leaving: int | None = None

    def counter(self, tenant: str) -> float:
        """Weighted tokens over weight, lifts included; 0 for a stranger."""
        found = self._tenants.get(tenant) or self._idle.get(tenant)
        return 0.0 if found is None else self._counter(found)

    # ---- the order ------------------------------------------------------------------------------------

    def key(self, sequence: SequenceView, now_s: float) -> RankKey:
        return (self._tenants[sequence.request.tenant].place, sequence.arrival_index)

    def outranks(self, head: SequenceView, other: SequenceView, now_s: float) -> bool:
        mine, theirs = self._tenants[head.request.tenant], self._tenants[other.request.tenant]
        if mine.place >= theirs.place:
            return False
        return self._counter(theirs) - self._counter(mine) > self._options.swap_margin_tokens

    def version(self, now_s: float) -> int:
        """Moves when the order of the tenants has changed, not when counters have."""
        if self._is_stale:
            self._is_stale = False
            self._order = sorted(self._tenants.values(), key=lambda each: (self._counter(each), each.number))
            has_changed = False
            for place, tenant in enumerate(self._order):
                has_changed |= tenant.place != place
                tenant.place = place
            self._version += has_changed
        return self._version

    def steps_valid(self, view: ReplicaView, now_s: float) -> int:
        """Until two neighbours in the order meet, or the head's tenant falls behind by the margin."""
        if not view.waiting_count:
            return FOREVER
        steps = float(FOREVER)
        for first, second in zip(self._order, self._order[1:], strict=False):
            steps = min(steps, self._steps_until(first, second, 0.0))
        head = self._tenants[next(iter(view.waiting)).request.tenant]
        for other in self._order:
            if other.decoding:
                steps = min(steps, self._steps_until(other, head, -self._options.swap_margin_tokens))
        return max(1, int(steps))

    def _steps_until(self, first: _Tenant, second: _Tenant, ahead: float) -> float:
        """Decode steps until the counter of `first` is `-ahead` above that of `second`; for ever if never."""
        speed = self._options.output_weight * (
            first.decoding / first.weight - second.decoding / second.weight
        )
        gap = self._counter(second) - self._counter(first) - ahead
        return gap / speed if speed > 0.0 and gap >= 0.0 else FOREVER

    # ---- what happens ---------------------------------------------------------------------------------

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        tenant = self._enter(sequence.request.tenant)
        if not tenant.waiting:
            self._lift(tenant)
        tenant.waiting += 1
        tenant.inside += 1

    def started(self, sequence: SequenceView, now_s: float) -> None:
        tenant = self._tenants[sequence.request.tenant]
        if sequence.arrival_index not in self._charged:
            self._charged.add(sequence.arrival_index)
            tenant.prompt_tokens += sequence.request.prompt_len
        self._leaving = None
        self._stop_waiting(tenant)

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        self._joining[sequence.arrival_index] = sequence

    def stepped(self, step: StepFacts, now_s: float) -> None:
        if step.decodes:
            self._clock += step.steps
            self._is_stale = True
        for index, sequence in self._joining.items():
            self._settle(sequence, 1)  # the prompt's last chunk gave a token
            tenant = self._tenants[sequence.request.tenant]
            tenant.decoding += 1
            tenant.joined += self._clock
            self._decodes[index] = _Decode(sequence.output_len, self._clock)
        self._joining.clear()

    def left(self, sequence: SequenceView, now_s: float) -> None:
        index = sequence.arrival_index
        tenant = self._tenants[sequence.request.tenant]
        if self._joining.pop(index, None) is not None:
            self._settle(sequence, 1)
        elif (decode := self._decodes.pop(index, None)) is not None:
            tenant.decoding -= 1
            tenant.joined -= decode.clock
            self._settle(sequence, sequence.output_len - decode.output_len)
        tenant.waiting += 1
        self._leaving = index
        self._is_stale = True

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        name, index = sequence.request.tenant, sequence.arrival_index
        tenant = self._tenants[name]
        if self._leaving == index:  # it ran until now
            tenant.waiting -= 1
        else:
            self._stop_waiting(tenant)
        self._leaving = None
        self._charged.discard(index)
        tenant.inside -= 1
        if not tenant.inside:
            del self._tenants[name]
            self._idle[name] = tenant
            while len(self._idle) > IDLE_TENANTS_MAX:
                self._idle.popitem(last=False)
        self._is_stale = True

    # ---- counters -------------------------------------------------------------------------------------

    def _counter(self, tenant: _Tenant) -> float:
        output = tenant.output_tokens + tenant.decoding * self._clock - tenant.joined
        service = self._options.input_weight * tenant.prompt_tokens + self._options.output_weight * output
        return service / tenant.weight + tenant.lifted

    def _settle(self, sequence: SequenceView, tokens: int) -> None:
        self._tenants[sequence.request.tenant].output_tokens += tokens
        self._is_stale = True

    def _enter(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._idle.pop(name, None)
            if tenant is None:
                tenant = _Tenant(self._weight_of(name), self._seen)
                self._seen += 1
            tenant.place = _LAST + tenant.number
            self._tenants[name] = tenant
            self._is_stale = True
        return tenant

    def _lift(self, tenant: _Tenant) -> None:
        """Algorithm 2, lines 6 to 12."""
        waiting = [self._counter(each) for each in self._tenants.values() if each.waiting]
        if not waiting and self._left_last is not None:
            waiting = [self._counter(self._left_last)]
        below = min(waiting, default=0.0) - self._counter(tenant)
        if below > 0.0:
            tenant.lifted += below
            self._is_stale = True

    def _stop_waiting(self, tenant: _Tenant) -> None:
        tenant.waiting -= 1
        if not tenant.waiting:
            self._left_last = tenant
        self._is_stale = True
