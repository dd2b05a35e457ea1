"""One replica of the twin: the real desk and the real replica, on modelled time.

The order of things is the live one: a request enters the desk when it arrives; what the desk releases
reaches the engine a moment later; the engine looks into its inbox between two steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.errors import PenstockError
from penstock.core.events import Finished
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import FinishReason
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.desk import Capacity, Desk
from penstock.policies.stack import make_stack_of, rank_class
from penstock.replica.limits import ReplicaLimits, check_feasible
from penstock.replica.replica import Replica
from penstock.twin.costs.model import CostModel
from penstock.twin.executor import Gaps, ModelledExecutor
from penstock.twin.host_link import link_of
from penstock.twin.sampling import POINTS_MAX, Sampler

OnOutcome = Callable[[RequestOutcome], None]

_NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class PathCosts:
    """Seconds outside the engine's steps: medians of `benchmarks/path_costs.py` (docs/twin.md).

    A prompt of token ids, as `penstock replay` sends by default, is not tokenised: one microsecond a token,
    where its prefill takes hundreds.
    """

    to_engine_s: float = 0.0013  # from the client's sending to the engine's inbox, tokenising left out
    tokenise_s_per_token: float = 1e-6
    to_client_s: float = 0.0008  # from the end of a step until the client has its token


class TwinReplica:
    """Advances in virtual time; tells `on_outcome` of every request's end."""

    def __init__(
        self,
        settings: Settings,
        limits: ReplicaLimits,
        cost: CostModel,
        path: PathCosts,
        on_outcome: OnOutcome,
        points_max: int = POINTS_MAX,
    ) -> None:
        capacity = Capacity(
            limits.context_len_max,
            limits.kv_block_tokens,
            limits.kv_blocks,
            limits.running_max,
            takes_queue=rank_class(settings.policies.rank).reorders,
        )
        self.replica = Replica(limits, make_stack_of(settings))
        self.sampler = Sampler(points_max)
        self.output_lens: dict[str, int] = {}
        self.executor = ModelledExecutor(cost, self.output_lens, link_of(limits, settings.twin))
        self._desk = Desk(settings.desk, capacity)
        self._path = path
        self._on_outcome = on_outcome
        self._inbox: deque[tuple[float, Request]] = deque()  # released by the desk, on their way
        self._inside: dict[str, Request] = {}

    @property
    def now_s(self) -> float:
        return self.executor.now_s

    @property
    def next_s(self) -> float:
        """When it acts next, as far as is known: now while it has work, never while it is empty."""
        if self.replica.has_work:
            return self.executor.now_s
        return max(self.executor.now_s, self._inbox[0][0]) if self._inbox else _NEVER

    def arrive(self, request: Request, output_tokens: int | None = None) -> None:
        """A request at its own arrival time; arrivals come in order. Refusals are outcomes as well.

        Its output ends by itself after `output_tokens`; None, or as many as it asks for: it does not.
        """
        self.advance(request.arrival_s)
        try:
            check_feasible(request, self.replica.limits)
            self._desk.enter([request])
        except PenstockError as error:
            self._on_outcome(_refused(request, error))
            return
        self._inside[request.id] = request
        if output_tokens is not None and output_tokens < request.max_output_tokens:
            self.output_lens[request.id] = output_tokens
        self._release(request.arrival_s)

    def advance(self, until_s: float) -> None:
        """Make steps until the clock is at or past `until_s`; an idle replica jumps there."""
        executor = self.executor
        while executor.now_s < until_s:
            self.proceed(until_s)

    def proceed(self, until_s: float) -> None:
        """One step, or a leap that ends by itself with the first end of a request or at `until_s`.

        An idle replica jumps to what is on its way to it, or to `until_s` where that is earlier.
        """
        executor, replica, inbox = self.executor, self.replica, self._inbox
        while inbox and inbox[0][0] <= executor.now_s:
            replica.submit(inbox.popleft()[1], executor.now_s)
        next_s = min(inbox[0][0], until_s) if inbox else until_s
        if not replica.has_work:
            self._sample()  # else the last sample would show work for as long as it is idle
            executor.now_s = next_s
            return
        executor.horizon_s = next_s
        self._step()
        if executor.now_s >= self.sampler.due_s:
            self._sample()

    def finish(self) -> None:
        """Serve everything that is inside."""
        while self._inside:
            self.proceed(_NEVER)
        self._sample()

    def _step(self) -> None:
        executor = self.executor
        plan = self.replica.plan(executor.now_s)
        if plan is None:
            return
        result = executor.execute(plan)
        for event in self.replica.complete(plan, result, executor.now_s):
            if type(event) is Finished:
                self._finished(event)

    def _sample(self) -> None:
        replica = self.replica
        stats = replica.stats()
        waiting = stats.waiting + self._desk.waiting_count + len(self._inbox)
        kv_frac = stats.kv_blocks_used / replica.block_count
        self.sampler.take(self.executor.now_s, stats.running, waiting, kv_frac)

    def _finished(self, event: Finished) -> None:
        request = self._inside.pop(event.request_id)
        self._desk.finish(request.id, event.at_s)
        self._on_outcome(self._outcome(request, event))
        if self._desk.waiting_count:
            self._release(event.at_s)

    def _release(self, now_s: float) -> None:
        path = self._path
        for request in self._desk.release():
            tokenised_s = request.arrival_s + path.tokenise_s_per_token * request.prompt_len
            self._inbox.append((max(now_s, tokenised_s) + path.to_engine_s, request))

    def _outcome(self, request: Request, event: Finished) -> RequestOutcome:
        times = self.executor.finish(request.id)
        self.output_lens.pop(request.id, None)
        delay_s = self._path.to_client_s
        first_s, last_s = (None, None) if times is None else (times.first_s, times.last_s)
        return RequestOutcome(
            request_id=request.id,
            arrival_s=request.arrival_s,
            finish=event.reason,
            finish_s=event.at_s + delay_s,
            prompt_tokens=event.prompt_tokens,
            output_tokens=event.output_tokens,
            cached_tokens=event.cached_tokens,
            first_token_s=None if first_s is None else first_s + delay_s,
            last_token_s=None if last_s is None else last_s + delay_s,
            itl_s=() if times is None else Gaps(times),
            tenant=request.tenant,
            slo_class=request.slo_class,
        )


def _refused(request: Request, error: PenstockError) -> RequestOutcome:
    return RequestOutcome(
        request_id=request.id,
        arrival_s=request.arrival_s,
        finish=FinishReason.REFUSED,
        finish_s=request.arrival_s,
        prompt_tokens=request.prompt_len,
        tenant=request.tenant,
        slo_class=request.slo_class,
        error_code=error.code,
    )
