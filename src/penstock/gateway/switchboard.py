"""Between the connections and the engine: opens calls, hands requests over, and spreads each step's events.

    handler ─► open(call) ─► desk ─► link.submit            (as the engine's window has room)
    link thread ─► inbox ─► event loop: spread events to calls, wake their tasks, refill the window

Everything but the inbox runs on the event loop. A call that ended for its client is still tracked until the
engine has said `Finished` for each of its requests, so the desk's count of what is inside stays true.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.core.errors import (
    DeadlineExceeded,
    Draining,
    InternalError,
    LimitError,
    NoHealthyEngine,
    Overloaded,
    PenstockError,
)
from penstock.core.events import Admitted, Finished, PhaseTimes, Preempted, TokenOut
from penstock.core.metrics import RequestOutcome
from penstock.core.reasons import CancelReason, FinishReason, ShedReason
from penstock.core.request import ProgramKey, Request
from penstock.core.settings import GatewaySettings
from penstock.desk import Desk
from penstock.gateway.health import EngineState, EngineWatch
from penstock.gateway.inflight import Call, Choice
from penstock.gateway.metrics import GatewayMetrics, PhaseSpans
from penstock.gateway.storms import StormWatch
from penstock.replica.messages import ProgramLeft, ReplicaDied, ReplicaLink, StepReport, ToolCalled

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S_MAX = 0.5
RETRY_AFTER_ENGINE_S = 10.0

OutcomeHook = Callable[[RequestOutcome, Request], None]


class Recorder(Protocol):
    """Keeps a log of every request's end."""

    @property
    def written(self) -> int: ...

    @property
    def dropped(self) -> int:
        """Ends that it could not keep up with."""

    def take(self, outcome: RequestOutcome, request: Request, output: Sequence[int]) -> None:
        """Called on the event loop; never blocks. `output`: all tokens drawn, a stop token included."""


class Switchboard:
    """Owns the desk and the link. `clock` is monotonic seconds."""

    def __init__(
        self,
        link: ReplicaLink,
        desk: Desk,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        clock: Callable[[], float],
        on_outcome: OutcomeHook | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._link = link
        self._desk = desk
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._on_outcome = on_outcome
        self._recorder = recorder
        self._tenants = metrics.tenants
        self._storms = StormWatch()
        self._choices: dict[str, Choice] = {}  # by request id, until settled
        self._calls: set[Call] = set()  # until their connection is done with them
        self._inbox: deque[StepReport | ReplicaDied] = deque()
        self._is_inbox_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._watch = EngineWatch(settings.stall_s, clock())
        self._drain_retry_s = max(1.0, settings.drain_timeout_s)
        self.is_draining = False

    def start(self) -> None:
        """Begin to listen to the engine; called once, on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._link.on_report(self._receive)
        self._watcher = self._loop.create_task(self._watch_over())

    async def stop(self) -> None:
        """Stop listening. Calls still open are failed."""
        self.fail_all(Draining("The server is shutting down.", retry_after_s=self._drain_retry_s))
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._loop = None

    @property
    def calls_open(self) -> int:
        return len(self._calls)

    @property
    def requests_open(self) -> int:
        """Requests not settled yet, waiting or running."""
        return len(self._choices)

    def has_spare_room(self, tenant: str) -> bool:
        """Whether work that can wait may be sent now: as the desk says."""
        return self._desk.has_spare_room(tenant)

    def engine_state(self) -> EngineState:
        return self._watch.state(self._clock())

    def check_engine(self) -> None:
        """Raise NoHealthyEngine unless the engine is alive and moving."""
        state = self.engine_state()
        if state is EngineState.OK:
            return
        still_s = self._watch.still_s(self._clock())
        what = "has died" if state is EngineState.DEAD else f"has not moved for {still_s:.0f} s"
        raise NoHealthyEngine(
            f"The engine {what}.",
            hint="Look at the server's log.",
            retry_after_s=RETRY_AFTER_ENGINE_S,
            reason=ShedReason.NO_ENGINE,
        )

    def check_ready(self) -> None:
        """Raise Draining or NoHealthyEngine. A full line is neither: the next request may find room."""
        if self.is_draining:
            raise Draining(
                "The server is shutting down and takes no new requests.",
                hint="Retry against another server.",
                retry_after_s=self._drain_retry_s,
                reason=ShedReason.DRAINING,
            )
        self.check_engine()

    def check_door(self, count: int, tenant: str) -> None:
        """Raise what `open` would for a call of `count` requests: before its prompt is tokenised."""
        try:
            self.check_ready()
            self._desk.check_room(count, tenant)
        except PenstockError as error:
            self._count_shed(error)
            raise

    def open(self, call: Call) -> None:
        """Let a call in, all its requests or none. Raises ServiceErrors and LimitErrors."""
        requests = call.plan.requests
        try:
            self.check_ready()
            self._desk.enter(requests)
        except PenstockError as error:
            self._count_shed(error)
            self._report_refused(requests, error)
            raise
        self._calls.add(call)
        self._choices.update((choice.request.id, choice) for choice in call.choices)
        self._tenants.entered(requests)
        self._refill()

    def close(self, call: Call) -> None:
        """The connection is done with a call; whatever of it still waits or runs is cancelled. Idempotent."""
        if call not in self._calls:
            return
        self._calls.remove(call)
        if any(not choice.is_settled and not choice.is_done for choice in call.choices):
            reason = call.gone or CancelReason.CLIENT_DISCONNECT
            self._metrics.cancelled(reason)
            self._cancel_rest(call, reason)

    def leave(self, call: Call, reason: CancelReason) -> None:
        """The client is gone: stop the work now, whatever its task is waiting for."""
        call.leave(reason)
        self.close(call)

    def expire(self, call: Call, deadline_s: float) -> None:
        """The call's own deadline has passed."""
        if call in self._calls and not call.is_over:
            call.gone = CancelReason.DEADLINE
            call.fail(DeadlineExceeded(f"The request was not done within its deadline of {deadline_s:g} s."))
            self._cancel_rest(call, CancelReason.DEADLINE)

    def stop_string_found(self, choice: Choice) -> None:
        """The text is complete: the engine need not go on."""
        self._cancel_in_engine(choice, CancelReason.STOP_STRING)

    def tool_called(self, choice: Choice, tool: str) -> None:
        """The answer names the tool that its program calls next: the engine may plan for it."""
        if not choice.is_settled:
            self._link.advise(ToolCalled(choice.request.id, tool))

    def unpin(self, program: ProgramKey) -> None:
        """The program will not return: whatever KV it left pinned can go."""
        self._link.advise(ProgramLeft(program))

    def begin_drain(self) -> None:
        """Refuse new calls from now on; those inside go on."""
        self.is_draining = True
        self._metrics.engine.is_draining = True

    def fail_all(self, error: PenstockError) -> int:
        """End every open call with `error` and cancel its work. Returns how many there were."""
        calls = [call for call in self._calls if not call.is_over]
        for call in calls:
            call.gone = CancelReason.SHUTDOWN
            call.fail(error)
            self._cancel_rest(call, CancelReason.SHUTDOWN)
        return len(calls)

    def refresh_metrics(self) -> None:
        """Bring the gauges up to now, for a scrape."""
        view = self._metrics.engine
        view.desk_requests, view.desk_tokens = self._desk.waiting_count, self._desk.waiting_tokens
        view.calls_open = len(self._calls)
        view.is_healthy = self.engine_state() is EngineState.OK
        view.heartbeat_age_s = self._watch.still_s(self._clock())
        if self._recorder is not None:
            view.recorded, view.record_dropped = self._recorder.written, self._recorder.dropped

    # From the link's thread

    def _receive(self, report: StepReport | ReplicaDied) -> None:
        """Put a report into the inbox; one callback on the loop takes all that have gathered."""
        self._inbox.append(report)
        loop = self._loop
        if loop is None or self._is_inbox_scheduled:
            return
        self._is_inbox_scheduled = True
        try:
            loop.call_soon_threadsafe(self._empty_inbox)
        except RuntimeError:  # the loop was closed meanwhile: nobody is left to tell
            logger.debug("a report came after the event loop had closed")

    # On the event loop

    def _empty_inbox(self) -> None:
        self._is_inbox_scheduled = False  # first: a report appended from here on schedules again
        while self._inbox:
            report = self._inbox.popleft()
            if isinstance(report, ReplicaDied):
                self._bury_engine(report.detail)
            else:
                self._spread(report)
        self._refill()

    def _spread(self, report: StepReport) -> None:
        now_s = self._clock()
        self._metrics.step(report.stats)
        if report.record is not None:
            self._metrics.compare(report.record)
        self._metrics.tokens(sum(isinstance(event, TokenOut) for event in report.events))
        for event in report.events:
            choice = self._choices.get(event.request_id)
            if choice is None:
                continue  # settled by us before the engine heard of it
            if isinstance(event, TokenOut):
                self._take_token(choice, event, now_s)
            elif isinstance(event, Finished):
                self._settle(choice, event, now_s)
            elif isinstance(event, Admitted):
                self._tenants.started(choice.request, resumed=event.resumed)
                if not event.resumed:
                    choice.progress.engine_admitted_s = event.at_s
                    choice.progress.cached_tokens = event.cached_len
            elif isinstance(event, Preempted):
                self._tenants.preempted(event.request_id)
                self._storms.preempted(event, now_s)
        storm = self._storms.reported(report.stats.step_index, report.stats.step_tokens, now_s)
        if storm is not None:
            logger.warning("%s", storm)
            self._metrics.storm(storm.cause)

    def _take_token(self, choice: Choice, event: TokenOut, now_s: float) -> None:
        progress = choice.progress
        progress.token_count += 1
        self._tenants.token(event.request_id)
        if progress.first_token_s is None:
            progress.first_token_s, progress.engine_first_s = now_s, event.at_s
            self._metrics.first_token(now_s - choice.request.arrival_s)
        else:
            assert progress.engine_last_s is not None
            self._metrics.gap(event.at_s - progress.engine_last_s)
        progress.last_token_s, progress.engine_last_s = now_s, event.at_s
        if self._recorder is not None:
            progress.output.append(event.token_id)
        call = choice.call
        if choice.is_done or call.gone is not None:
            return
        choice.pending.append(event)
        call.wake()
        is_blocked = call.sending_since_s is not None
        if is_blocked and call.pending_count > self._settings.stream_buffer_tokens_max:
            self._cut(call)

    def _settle(self, choice: Choice, event: Finished, now_s: float) -> None:
        """The engine's last word on a request."""
        self._desk.finish(choice.request.id, now_s)
        del self._choices[choice.request.id]
        choice.is_settled = True
        output = choice.progress.output
        if event.stop_token_id is not None and len(output) < event.output_tokens:
            output.append(event.stop_token_id)  # drawn and counted, but not told
        self._report_outcome(choice, event.reason, event.phases, now_s, event.detail)
        call = choice.call
        if choice.is_done or call.gone is not None:
            return
        if event.reason in (FinishReason.STOP, FinishReason.LENGTH):
            choice.pending.append(event)
            call.wake()
            return
        logger.error(
            "request %s ended in the engine as %s: %s", choice.request.id, event.reason, event.detail
        )
        call.fail(
            InternalError(
                f"The engine could not finish request `{call.plan.id}`.", hint="Look at the server's log."
            )
        )
        self._cancel_rest(call, CancelReason.ADMIN)

    def _refill(self) -> None:
        """Hand over as many waiting requests as the engine's window takes."""
        if self._watch.state(self._clock()) is EngineState.DEAD:
            return
        for request in self._desk.release():
            self._choices[request.id].progress.released_s = self._clock()
            self._link.submit(request)

    def _cancel_rest(self, call: Call, reason: CancelReason) -> None:
        """Cancel what of a call is still waiting (settled at once) or running (the engine will say)."""
        for choice in call.choices:
            request_id = choice.request.id
            if choice.is_settled:
                continue
            if self._desk.cancel(request_id):
                del self._choices[request_id]
                choice.is_settled = True
                self._report_outcome(
                    choice, FinishReason.CANCELLED, PhaseTimes(), self._clock(), reason.value
                )
            else:
                self._cancel_in_engine(choice, reason)

    def _cancel_in_engine(self, choice: Choice, reason: CancelReason) -> None:
        """Tell the engine, once; it answers with `Finished`."""
        if not choice.is_settled and not choice.is_cancel_sent:
            choice.is_cancel_sent = True
            self._link.cancel(choice.request.id, reason)

    def _bury_engine(self, detail: str) -> None:
        """Everything the engine held is lost; everybody is told."""
        if self._watch.state(self._clock()) is EngineState.DEAD and not self._choices:
            return
        logger.error("the engine died: %s", detail)
        self._watch.mark_dead()
        now_s = self._clock()
        for request in self._desk.clear():
            choice = self._choices.pop(request.id)
            choice.is_settled = True
            self._report_outcome(choice, FinishReason.FAILED, PhaseTimes(), now_s, detail)
        error = NoHealthyEngine(
            "The engine died while it worked on this request.",
            hint="Send it again later.",
            retry_after_s=RETRY_AFTER_ENGINE_S,
        )
        for call in self._calls:
            if not call.is_over:
                call.fail(error)

    async def _watch_over(self) -> None:
        """Every so often: look at the heartbeat, keep silent streams alive, cut clients that do not read."""
        interval_s = min(WATCH_INTERVAL_S_MAX, self._settings.stall_s / 4, self._settings.keepalive_s / 4)
        while True:
            self._watch.observe(self._link.heartbeat(), self._link.is_alive(), self._clock())
            if self.engine_state() is EngineState.DEAD and self._choices:
                self._bury_engine("its process is gone")
            now_s = self._clock()
            for call in list(self._calls):
                self._watch_over_call(call, now_s)
            await asyncio.sleep(interval_s)

    def _watch_over_call(self, call: Call, now_s: float) -> None:
        if call.sending_since_s is None:
            call.wake()  # its task decides whether a keep-alive is due
        elif now_s - call.sending_since_s > self._settings.write_stall_s:
            self._cut(call)

    def _cut(self, call: Call) -> None:
        """The client does not read: end its work and its connection, whose buffers will never empty."""
        self.leave(call, CancelReason.SLOW_CLIENT)
        if call.close_connection is not None:
            call.close_connection()

    # Accounts

    def _count_shed(self, error: PenstockError) -> None:
        if error.reason is not None:
            self._metrics.shed(error.reason)

    def _report_refused(self, requests: list[Request], error: PenstockError) -> None:
        if not isinstance(error, (Overloaded, LimitError)):
            return
        now_s = self._clock()
        for request in requests:
            outcome = RequestOutcome(
                request_id=request.id,
                arrival_s=request.arrival_s,
                finish=FinishReason.REFUSED,
                finish_s=now_s,
                prompt_tokens=request.prompt_len,
                tenant=request.tenant,
                slo_class=request.slo_class,
                error_code=error.code,
            )
            self._publish(outcome, PhaseSpans(), request)

    def _report_outcome(
        self, choice: Choice, reason: FinishReason, phases: PhaseTimes, now_s: float, detail: str | None
    ) -> None:
        request, progress = choice.request, choice.progress
        self._tenants.left(request.id)
        outcome = RequestOutcome(
            request_id=request.id,
            arrival_s=request.arrival_s,
            finish=reason,
            finish_s=now_s,
            prompt_tokens=request.prompt_len,
            output_tokens=progress.token_count,
            cached_tokens=progress.cached_tokens,
            first_token_s=progress.first_token_s,
            last_token_s=progress.last_token_s,
            tenant=request.tenant,
            slo_class=request.slo_class,
            error_code=None if reason in (FinishReason.STOP, FinishReason.LENGTH) else detail,
        )
        desk_wait_s = (progress.released_s or now_s) - request.arrival_s
        spans = PhaseSpans(
            queue_s=desk_wait_s + phases.queue_s,
            prefill_s=phases.prefill_s,
            decode_s=phases.decode_s,
            preempted_s=phases.preempted_s,
            overhead_s=outcome.e2e_s - desk_wait_s - phases.total_s,
        )
        self._publish(outcome, spans, request, progress.output)

    def _publish(
        self, outcome: RequestOutcome, spans: PhaseSpans, request: Request, output: Sequence[int] = ()
    ) -> None:
        self._metrics.finished(outcome, spans)
        if self._recorder is not None:
            self._recorder.take(outcome, request, output)
        if self._on_outcome is not None:
            self._on_outcome(outcome, request)
