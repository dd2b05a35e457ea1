"""One HTTP request in flight: engine events go in, text for each choice comes out.

The switchboard feeds a `Call` (cheap: append and wake); the connection's own task drains it, which is where
text is decoded. Streams and whole answers drain the same way, so they cannot differ.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.errors import PenstockError
from penstock.core.events import Finished, TokenOut
from penstock.core.reasons import CancelReason, FinishReason
from penstock.core.request import Request
from penstock.core.step import TokenLogprobs
from penstock.gateway.convert import CallPlan
from penstock.gateway.text import Detokenizer, MakeDetokenizer
from penstock.gateway.tool_watch import ToolWatch


@dataclass(slots=True)
class ScoredToken:
    """A token and its log-probabilities; None for the first token of an echoed prompt, which has no past."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class Delta:
    """What one choice has new. The one with a `finish_reason` is its last."""

    index: int
    text: str = ""
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it, if the client named one

    @property
    def is_empty(self) -> bool:
        return not self.text and not self.scored and self.finish_reason is None


@dataclass(slots=True)
class Usage:
    """Token counts of a whole call."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Progress:
    """Where a request is, for metrics. `_s` is the gateway's clock; `engine_` the replica's, never mixed."""

    released_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    engine_admitted_s: float | None = None
    engine_first_s: float | None = None
    engine_last_s: float | None = None
    token_count: int = 0
    cached_tokens: int = 0
    output: list[int] = field(default_factory=list)  # kept where somebody records, a stop token included


class Choice:
    """One completion. `pending` is what arrived and was not decoded yet."""

    def __init__(
        self, index: int, request: Request, call: Call, detokenizer: Detokenizer, echo_text: str | None
    ) -> None:
        self.index = index
        self.request = request
        self.call = call
        self.progress = Progress()
        self.pending: deque[TokenOut | Finished] = deque()
        self.output_tokens = 0  # decoded, and part of the answer
        self.is_done = False  # nothing more goes to the client
        self.is_settled = False  # the engine (or the desk) is done with it
        self.is_cancel_sent = False
        self._detokenizer = detokenizer
        self._echo_text = echo_text
        self._unsent_scored: list[ScoredToken] = []
        wants_tool = request.program is not None and request.tool is None and not request.is_last_turn
        self._tools = ToolWatch() if call.on_tool is not None and wants_tool else None

    def drain(self) -> Delta:
        """Decode what is pending. Changes the choice; the delta may be empty."""
        delta = Delta(self.index)
        while self.pending and not self.is_done:
            event = self.pending.popleft()
            if isinstance(event, TokenOut):
                self._drain_token(event, delta)
            else:
                self._drain_finish(event, delta)
        self.pending.clear()
        if self._tools is not None and delta.text and self._tools.feed(delta.text):
            assert self.call.on_tool is not None and self._tools.tool is not None
            self.call.on_tool(self, self._tools.tool)
        if delta.text or self.is_done:  # scores travel with the text they belong to
            delta.scored, self._unsent_scored = self._unsent_scored, []
        return delta

    def _drain_token(self, event: TokenOut, delta: Delta) -> None:
        if self.output_tokens == 0 and self._echo_text is not None:
            self._drain_echo(event, delta)
        self.output_tokens += 1
        if event.token_id in self.request.stop_token_ids:
            return  # the token that says stop counts, but is no part of the text
        if event.logprobs is not None:
            self._unsent_scored.append(ScoredToken(event.token_id, event.logprobs))
        delta.text += self._detokenizer.push(event.token_id)
        if self._detokenizer.stopped_by is not None:
            self._finish(delta, "stop", self._detokenizer.stopped_by)
            self.call.on_stop_string(self)

    def _drain_echo(self, event: TokenOut, delta: Delta) -> None:
        """The prompt goes out before the first token, scored when scores were asked for."""
        delta.text += self._echo_text or ""
        if event.prompt_logprobs is None:
            return
        prompt = self.request.prompt_tokens or ()
        scores = [None] * (len(prompt) - len(event.prompt_logprobs)) + list(event.prompt_logprobs)
        scores[0] = None
        self._unsent_scored += [
            ScoredToken(token_id, score) for token_id, score in zip(prompt, scores, strict=True)
        ]

    def _drain_finish(self, event: Finished, delta: Delta) -> None:
        delta.text += self._detokenizer.finish()
        if self._detokenizer.stopped_by is not None:  # completed by a character that never became whole
            self._finish(delta, "stop", self._detokenizer.stopped_by)
            return
        is_asked_stop = event.stop_token_id is not None and event.stop_token_id not in self.call.eos_ids
        self._finish(delta, event.reason.value, event.stop_token_id if is_asked_stop else None)

    def _finish(self, delta: Delta, reason: str, stop_reason: str | int | None) -> None:
        assert reason in (FinishReason.STOP, FinishReason.LENGTH), "other ends are errors of the whole call"
        delta.finish_reason, delta.stop_reason = reason, stop_reason
        self.is_done = True


class Call:
    """All choices of one HTTP request, and the task that waits for them."""

    def __init__(
        self,
        plan: CallPlan,
        eos_ids: frozenset[int],
        make_detokenizer: MakeDetokenizer,
        on_stop_string: Callable[[Choice], None],
        on_tool: Callable[[Choice, str], None] | None = None,
    ) -> None:
        """`on_tool` hears of the tools that the answers call, where the client has not told."""
        self.plan = plan
        self.on_tool = on_tool
        self.eos_ids = eos_ids
        self.on_stop_string = on_stop_string
        self.error: PenstockError | None = None
        self.gone: CancelReason | None = None  # nobody is there to answer any more
        self.sending_since_s: float | None = None  # set while a write to the client is blocked
        self.close_connection: Callable[[], None] | None = None
        self.choices = [
            Choice(
                index,
                request,
                self,
                make_detokenizer(plan.stops, plan.continues_prompt),
                plan.echo_texts[index // plan.choices_per_prompt] if plan.echo_texts else None,
            )
            for index, request in enumerate(plan.requests)
        ]
        self._wake = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.gone is not None or all(choice.is_done for choice in self.choices)

    @property
    def pending_count(self) -> int:
        return sum(len(choice.pending) for choice in self.choices)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.plan.prompt_token_count,
            completion_tokens=sum(choice.output_tokens for choice in self.choices),
            cached_tokens=self.cached_tokens,
        )

    @property
    def cached_tokens(self) -> int:
        """Of each prompt's first choice: the siblings' hits are their own leader's work."""
        leaders = self.choices[:: self.plan.choices_per_prompt]
        return sum(choice.progress.cached_tokens for choice in leaders)

    def wake(self) -> None:
        """Something changed: tokens, an error, or it is time for a keep-alive."""
        self._wake.set()

    def fail(self, error: PenstockError) -> None:
        """End with an error; the first one counts."""
        self.error = self.error or error
        self.wake()

    def leave(self, reason: CancelReason) -> None:
        """The client is gone; the task wakes up to clean up."""
        self.gone = self.gone or reason
        self.wake()

    async def next_deltas(self) -> list[Delta]:
        """Wait until woken; what is new, possibly nothing. Raises the error the call ended with, if any."""
        await self._wake.wait()
        self._wake.clear()
        if self.error is not None:
            raise self.error
        if self.gone is not None:
            return []
        deltas = [choice.drain() for choice in self.choices if choice.pending]
        return [delta for delta in deltas if not delta.is_empty]
