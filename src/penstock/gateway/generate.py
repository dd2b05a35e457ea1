"""`POST /v1/chat/completions` and `/v1/completions`: from the HTTP request to an `Answer`."""

from __future__ import annotations

import logging
import random
import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from penstock.gateway.access import check_key, deadline_s_of, slo_class_of, tenant_of
from penstock.gateway.answer import Answer
from penstock.gateway.body import Hold, parse_json_object, read_body
from penstock.gateway.chat import ChatRenderer
from penstock.gateway.compat import refuse_unknown, refuse_unsupported, unknown_fields
from penstock.gateway.completions import CompletionRenderer
from penstock.gateway.convert import (
    Caller,
    CallPlan,
    chat_messages,
    check_generation,
    check_stops,
    check_token_ids,
    plan_chat,
    plan_completion,
)
from penstock.gateway.errors import from_validation
from penstock.gateway.inflight import Call
from penstock.gateway.program_turn import turn_of
from penstock.gateway.render import Head, Renderer
from penstock.gateway.schema import ChatRequest, CompletionRequest, Generation, Prompt, Wire
from penstock.gateway.state import Gateway
from penstock.gateway.text import MESSAGE_BYTES

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=Wire)


@dataclass(frozen=True, slots=True)
class Received(Generic[Body]):
    """A validated body, the unknown fields in it, and when all of it had arrived (TTFT's start)."""

    body: Body
    ignored: list[str]
    arrival_s: float


async def read_request(request: Request, gateway: Gateway, model: type[Body], hold: Hold) -> Received[Body]:
    """Read, parse (a large body off the loop) and validate. Raises RequestErrors and Overloaded."""
    settings = gateway.settings.gateway
    check_key(request, settings)
    raw = await read_body(request, hold, settings)
    arrival_s = gateway.clock()
    parsed = await gateway.pool.run(len(raw), partial(_parse, raw, model))
    ignored = unknown_fields(parsed)
    if settings.strict_fields:
        refuse_unknown(ignored)
    for name in ignored:
        if gateway.is_new_unknown(name):
            logger.warning("ignoring the unknown request field %s", name)
    return Received(parsed, ignored, arrival_s)


def _parse(body: bytes | bytearray, model: type[Body]) -> Body:
    return validated(parse_json_object(body), model)


def validated(payload: dict[str, Any], model: type[Body]) -> Body:
    """The body as what it should be. Raises RequestErrors naming the field."""
    refuse_unsupported(payload)
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        raise from_validation(error, payload) from None


async def answer_chat(request: Request, gateway: Gateway) -> Answer:
    """One chat completion. Raises what the request deserves; the answer itself opens the call."""
    with gateway.budget.hold() as hold:
        received = await read_request(request, gateway, ChatRequest, hold)
        body = received.body
        caller = _caller(request, gateway, received.arrival_s, body)
        check_generation(body, gateway.served)
        check_stops(body, body.n or 1)
        gateway.switchboard.check_door(body.n or 1, caller.tenant)
        messages = chat_messages(body.messages)
        encode = partial(encode_chat, gateway, messages)
        tokens = await gateway.pool.run(chat_bytes(messages), encode, gateway.chat_inline_bytes)
        plan, renderer = chat_call(gateway, body, tokens, caller)
        return _answer(request, gateway, plan, renderer, received.ignored)


async def answer_completion(request: Request, gateway: Gateway) -> Answer:
    """Legacy completions of one or many prompts."""
    with gateway.budget.hold() as hold:
        received = await read_request(request, gateway, CompletionRequest, hold)
        body = received.body
        caller = _caller(request, gateway, received.arrival_s, body)
        check_generation(body, gateway.served)
        choice_count = len(body.prompt) * (body.n or 1)
        check_stops(body, choice_count)
        gateway.switchboard.check_door(choice_count, caller.tenant)
        tokens = [await _encode_prompt(gateway, prompt) for prompt in body.prompt]
        plan, renderer = completion_call(gateway, body, tokens, caller)
        return _answer(request, gateway, plan, renderer, received.ignored)


def chat_call(
    gateway: Gateway, body: ChatRequest, tokens: list[int], caller: Caller
) -> tuple[CallPlan, Renderer]:
    """What to compute for a conversation of these tokens, and how to say it. Raises RequestErrors."""
    plan = plan_chat(body, tokens, gateway.served, caller, _new_id(ChatRenderer), random.getrandbits(63))
    renderer = ChatRenderer(
        _head(gateway, plan.id),
        gateway.tokenizer,
        has_logprobs=bool(body.logprobs),
        has_usage_chunk=plan.has_usage_chunk,
    )
    return plan, renderer


def completion_call(
    gateway: Gateway, body: CompletionRequest, tokens: list[list[int]], caller: Caller
) -> tuple[CallPlan, Renderer]:
    """As `chat_call`, for prompts of these tokens."""
    echo_texts = [_prompt_text(gateway, prompt) for prompt in body.prompt] if body.echo else []
    plan = plan_completion(
        body,
        tokens,
        echo_texts,
        gateway.served,
        caller,
        _new_id(CompletionRenderer),
        random.getrandbits(63),
    )
    renderer = CompletionRenderer(
        _head(gateway, plan.id),
        gateway.tokenizer,
        has_logprobs=body.logprobs is not None,
        has_usage_chunk=plan.has_usage_chunk,
    )
    return plan, renderer


def chat_bytes(messages: list[dict[str, str]]) -> int:
    """About how much work a conversation is."""
    return sum(len(message["content"]) + MESSAGE_BYTES for message in messages)


def encode_chat(
    gateway: Gateway, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Render and encode; the template writes the special tokens itself."""
    text = gateway.template.render(messages, add_generation_prompt=add_generation_prompt)
    return gateway.tokenizer.encode(text, add_special=False, parse_special=True)


async def _encode_prompt(gateway: Gateway, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        encode = partial(gateway.tokenizer.encode, prompt, add_special=True, parse_special=True)
        return await gateway.pool.run(len(prompt), encode)
    check_token_ids(prompt, gateway.served, "prompt")
    return prompt


def _prompt_text(gateway: Gateway, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else gateway.tokenizer.decode(prompt)


def _caller(request: Request, gateway: Gateway, arrival_s: float, body: Generation) -> Caller:
    return Caller(
        arrival_s,
        turn=turn_of(request.headers, body, gateway.served.keeps_pins),
        tenant=tenant_of(request, gateway.settings.gateway),
        slo_class=slo_class_of(request, gateway.served.classes),
    )


def _new_id(renderer: type[ChatRenderer] | type[CompletionRenderer]) -> str:
    return renderer.id_prefix + uuid.uuid4().hex


def _head(gateway: Gateway, call_id: str) -> Head:
    return Head(call_id, int(time.time()), gateway.served.model, gateway.info.fingerprint)


def _answer(
    request: Request, gateway: Gateway, plan: CallPlan, renderer: Renderer, ignored: list[str]
) -> Answer:
    switchboard = gateway.switchboard
    logger.debug("request %s is %s", request.scope["state"]["request_id"], plan.id)
    call = Call(
        plan,
        gateway.served.eos_ids,
        gateway.make_detokenizer,
        switchboard.stop_string_found,
        switchboard.tool_called if gateway.served.keeps_pins else None,
    )
    headers: dict[str, Any] = {"x-penstock-ignored": ", ".join(ignored)} if ignored else {}
    return Answer(
        call,
        renderer,
        switchboard,
        gateway.clock,
        engine=gateway.info.engine,
        keepalive_s=gateway.settings.gateway.keepalive_s,
        deadline_s=deadline_s_of(request),
        extra_headers=headers,
    )
