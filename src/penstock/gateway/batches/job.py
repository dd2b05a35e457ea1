"""One job through the gateway: tokenise all lines, plan, and send them in the plan's order.

    lines ─► prepare (threads): validate, tokenise ─► JobPlanner ─► open calls, a window at a time ─► results

The API's background tier and `penstock batch` share it. Calls go through the same switchboard, desk and
engine as everybody's; where the job is in the background, one is opened only while nobody waits at the desk.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from penstock.core.errors import (
    Draining,
    InvalidRequest,
    LimitError,
    NoHealthyEngine,
    PenstockError,
    ServiceError,
)
from penstock.core.reasons import CancelReason
from penstock.core.settings import PolicySettings
from penstock.desk.job_plan import JobGroup, JobPlan, JobPlanner
from penstock.gateway.batches.lines import CHAT_ENDPOINT, JobFile, JobLine, LineResult
from penstock.gateway.compat import refuse_unknown, unknown_fields
from penstock.gateway.convert import (
    Caller,
    CallPlan,
    chat_messages,
    check_generation,
    check_stops,
    check_token_ids,
)
from penstock.gateway.generate import chat_call, completion_call, encode_chat, validated
from penstock.gateway.inflight import Call
from penstock.gateway.render import JSON, Renderer, Whole
from penstock.gateway.schema import ChatRequest, CompletionRequest
from penstock.gateway.state import Gateway
from penstock.policies.rank.prefix_group import BATCH_CLASS

BATCH_PRIORITY: Final = 1_000_000  # lower goes first, so this is behind everybody
ROOM_POLL_S: Final = 0.02
RETRY_S_MAX: Final = 5.0
PAUSE_S_MAX: Final = 0.2
INLINE_BYTES_MAX: Final = 4096  # longer lines are read again beside the event loop
PREPARE_AT_ONCE: Final = 64  # lines a thread takes before it lets others run


@dataclass(slots=True)
class _Ready:
    """A line that may run. Tokens are kept as four bytes each until its turn comes."""

    line: JobLine
    prompts: list[array[int]]
    output_tokens: int


class Job:
    """Lines of one file. `on_result` is called on the event loop, once for each line that was run."""

    def __init__(
        self,
        gateway: Gateway,
        file: JobFile,
        lines: Sequence[JobLine],
        *,
        name: str,
        tenant: str,
        in_flight_max: int,
        is_background: bool,
        on_result: Callable[[LineResult], None],
    ) -> None:
        self._gateway = gateway
        self._file = file
        self._lines = lines
        self._name = name
        self._tenant = tenant
        self._in_flight_max = in_flight_max
        self._is_background = is_background
        self._on_result = on_result
        self._slo_class = batch_class_of(gateway.settings.policies)
        self._ready: list[_Ready] = []
        self.plan = JobPlan((), (), 1)

    async def prepare(self) -> JobPlan:
        """Validate and tokenise every line, then plan. Lines that cannot run have their result at once."""
        for first in range(0, len(self._lines), PREPARE_AT_ONCE):
            lines = self._lines[first : first + PREPARE_AT_ONCE]
            began_s = self._gateway.clock()
            prepared = await asyncio.to_thread(self._prepare_some, lines)
            if self._is_background and self._gateway.switchboard.calls_open:
                # A thread that tokenises competes with the event loop: half of the time is others'.
                await asyncio.sleep(min(PAUSE_S_MAX, self._gateway.clock() - began_s))
            for found in prepared:
                if isinstance(found, LineResult):
                    self._on_result(found)
                else:
                    self._ready.append(found)
        planner = JobPlanner(self._gateway.info.kv_block_tokens)
        prompts = [each.prompts[0] for each in self._ready]
        outputs = [float(each.output_tokens) for each in self._ready]
        self.plan = await asyncio.to_thread(planner.prepare, prompts, outputs)
        return self.plan

    async def run(self) -> None:
        """Run what is ready. Cancelled, it stops all that is in flight, which then has no result.

        Raises NoHealthyEngine or Draining when the server cannot go on; lines without a result may run later.
        """
        names = {id(group): f"{self._name}/{index}" for index, group in enumerate(self.plan.groups)}
        flying: set[asyncio.Task[None]] = set()
        try:
            for place, group in self.plan.order:
                while len(flying) >= self._in_flight_max:
                    flying = await _wait_for_one(flying)
                call, renderer = await self._open(self._ready[place], group, names[id(group)])
                task = asyncio.create_task(self._answer(self._ready[place].line, call, renderer))
                flying.add(task)
                self._ready[place].prompts = []  # the call has them now
            while flying:
                flying = await _wait_for_one(flying)
        finally:
            for task in flying:
                task.cancel()
            await asyncio.gather(*flying, return_exceptions=True)

    # ---- one line -------------------------------------------------------------------------------------

    def _prepare_some(self, lines: Sequence[JobLine]) -> list[_Ready | LineResult]:
        return [self._prepare(line) for line in lines]

    def _prepare(self, line: JobLine) -> _Ready | LineResult:
        try:
            body = self._body(line)
            prompts = self._tokens(body)
            plan, _ = self._plan(body, prompts, 0.0)
        except PenstockError as error:
            return LineResult(line, f"{self._name}-{line.number}", error=error)
        output_tokens = sum(request.max_output_tokens for request in plan.requests)
        return _Ready(line, [array("I", prompt) for prompt in prompts], output_tokens)

    def _body(self, line: JobLine) -> ChatRequest | CompletionRequest:
        payload = self._file.body(line)
        body: ChatRequest | CompletionRequest
        if line.endpoint == CHAT_ENDPOINT:
            body = validated(payload, ChatRequest)
        else:
            body = validated(payload, CompletionRequest)
        if body.stream:
            raise InvalidRequest(
                "`stream` has no meaning in a batch.", hint="Leave it out; answers are whole.", param="stream"
            )
        if self._gateway.settings.gateway.strict_fields:
            refuse_unknown(unknown_fields(body))
        check_generation(body, self._gateway.served)
        prompt_count = len(body.prompt) if isinstance(body, CompletionRequest) else 1
        check_stops(body, prompt_count * (body.n or 1))
        return body

    def _tokens(self, body: ChatRequest | CompletionRequest) -> list[list[int]]:
        gateway = self._gateway
        if isinstance(body, ChatRequest):
            return [encode_chat(gateway, chat_messages(body.messages))]
        tokens = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                tokens.append(gateway.tokenizer.encode(prompt, add_special=True, parse_special=True))
            else:
                check_token_ids(prompt, gateway.served, "prompt")
                tokens.append(prompt)
        return tokens

    def _plan(
        self, body: ChatRequest | CompletionRequest, prompts: list[list[int]], arrival_s: float
    ) -> tuple[CallPlan, Renderer]:
        caller = Caller(arrival_s, tenant=self._tenant, slo_class=self._slo_class)
        if isinstance(body, ChatRequest):
            return chat_call(self._gateway, body, prompts[0], caller)
        return completion_call(self._gateway, body, prompts, caller)

    async def _open(self, ready: _Ready, group: JobGroup, group_name: str) -> tuple[Call, Renderer]:
        """Let the line's call in, when there is room for it."""
        gateway, switchboard = self._gateway, self._gateway.switchboard
        if ready.line.length <= INLINE_BYTES_MAX:
            body = self._body(ready.line)
        else:
            body = await asyncio.to_thread(self._body, ready.line)
        while True:
            while self._is_background and not self._may_open():
                await asyncio.sleep(ROOM_POLL_S)
            plan, renderer = self._plan(body, [list(each) for each in ready.prompts], gateway.clock())
            self._give_hints(plan, group, group_name)
            call = Call(plan, gateway.served.eos_ids, gateway.make_detokenizer, switchboard.stop_string_found)
            try:
                switchboard.open(call)
                return call, renderer
            except (Draining, NoHealthyEngine):
                raise
            except (ServiceError, LimitError) as error:
                await asyncio.sleep(min(error.retry_after_s or RETRY_S_MAX, RETRY_S_MAX))

    def _may_open(self) -> bool:
        switchboard = self._gateway.switchboard
        return switchboard.is_draining or switchboard.has_spare_room(self._tenant)

    def _give_hints(self, plan: CallPlan, group: JobGroup, group_name: str) -> None:
        has_group = group.shared_len > 0 and len(plan.requests) == plan.choices_per_prompt
        plan.requests[:] = [
            replace(
                request,
                priority=BATCH_PRIORITY if self._is_background else 0,
                group_id=group_name if has_group else None,
                shared_len=group.shared_len if has_group else 0,
            )
            for request in plan.requests
        ]

    async def _answer(self, line: JobLine, call: Call, renderer: Renderer) -> None:
        try:
            result = LineResult(line, call.plan.id, body=await self._whole(call, renderer))
        except (Draining, NoHealthyEngine):
            raise  # not the request's fault: it runs again later
        except PenstockError as error:
            result = LineResult(line, call.plan.id, error=error)
        self._on_result(result)

    async def _whole(self, call: Call, renderer: Renderer) -> JSON:
        answers = [Whole(choice.index) for choice in call.choices]
        try:
            while not call.is_over:
                for delta in await call.next_deltas():
                    answers[delta.index].add(delta)
        finally:
            if not call.is_over:
                call.leave(CancelReason.ADMIN)
            self._gateway.switchboard.close(call)
        if call.gone is not None:
            raise Draining("The server shut down before the request was done.")
        return renderer.whole(answers, call.usage)


def batch_class_of(policies: PolicySettings) -> str:
    """The class of service that `rank/prefix-group` puts behind all others."""
    return str(policies.options.get("prefix-group", {}).get("batch_class", BATCH_CLASS))


async def _wait_for_one(flying: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Those still flying once one has landed. Raises what one failed with."""
    landed, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
    for task in landed:
        task.result()
    return flying
