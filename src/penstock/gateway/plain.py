"""Endpoints that answer at once: models, tokens, health, metrics, version and load."""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from penstock import __version__
from penstock.core.errors import InvalidRequest, UnsupportedParameter
from penstock.gateway.access import check_key, tenant_of
from penstock.gateway.convert import chat_messages, check_model, check_token_ids
from penstock.gateway.generate import chat_bytes, encode_chat, read_request
from penstock.gateway.schema import NAME_CHARS_MAX, DetokenizeRequest, TokenizeRequest
from penstock.gateway.state import Gateway
from penstock.gateway.text import INLINE_BYTES_MAX

METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def json_response(payload: Any) -> Response:
    return Response(orjson.dumps(payload), media_type="application/json")


def answer_models(request: Request, gateway: Gateway) -> Response:
    check_key(request, gateway.settings.gateway)
    return json_response({"object": "list", "data": [_model_card(gateway)]})


def answer_model(request: Request, gateway: Gateway, name: str) -> Response:
    check_key(request, gateway.settings.gateway)
    check_model(name, gateway.served)
    return json_response(_model_card(gateway))


def _model_card(gateway: Gateway) -> dict[str, Any]:
    return {
        "id": gateway.served.model,
        "object": "model",
        "created": gateway.started_s,
        "owned_by": "penstock",
        "root": gateway.info.model,
        "parent": None,
        "max_model_len": gateway.info.context_len_max,
    }


def answer_unpin(request: Request, gateway: Gateway, program_id: str) -> Response:
    """The engine hears of it before the next step; a program without a pin is no error."""
    check_key(request, gateway.settings.gateway)
    if not gateway.served.keeps_pins:
        raise UnsupportedParameter(
            "This server pins no KV between turns.",
            hint="Start it with a `retain` policy that does, such as the preset `continuum`.",
            param="program_id",
        )
    if not 1 <= len(program_id) <= NAME_CHARS_MAX:
        raise InvalidRequest(f"`program_id` must have 1 to {NAME_CHARS_MAX} characters.", param="program_id")
    gateway.switchboard.unpin((tenant_of(request, gateway.settings.gateway), program_id))
    return json_response({"id": program_id, "object": "pin", "released": True})


async def answer_tokenize(request: Request, gateway: Gateway) -> Response:
    """vLLM's shapes: a prompt or messages in, ids out."""
    with gateway.budget.hold() as hold:
        body = (await read_request(request, gateway, TokenizeRequest, hold)).body
        check_model(body.model, gateway.served)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Give either `prompt` or `messages`.", param="prompt")
        messages = chat_messages(body.messages or ())
        work = partial(_tokenize, gateway, body, messages)
        size_bytes = len(body.prompt or "") + chat_bytes(messages)
        inline_bytes = gateway.chat_inline_bytes if messages else INLINE_BYTES_MAX
        return Response(await gateway.pool.run(size_bytes, work, inline_bytes), media_type="application/json")


def _tokenize(gateway: Gateway, body: TokenizeRequest, messages: list[dict[str, str]]) -> bytes:
    """The whole answer as JSON: with a large prompt that, too, takes its time."""
    tokenizer = gateway.tokenizer
    if messages:
        add_generation_prompt = body.add_generation_prompt is not False
        tokens = encode_chat(gateway, messages, add_generation_prompt=add_generation_prompt)
    else:
        add_special = body.add_special_tokens is not False
        tokens = tokenizer.encode(body.prompt or "", add_special=add_special, parse_special=True)
    answer = {
        "count": len(tokens),
        "max_model_len": gateway.info.context_len_max,
        "tokens": tokens,
        "token_strs": [tokenizer.token_text(token_id) for token_id in tokens]
        if body.return_token_strs
        else None,
    }
    return orjson.dumps(answer)


async def answer_detokenize(request: Request, gateway: Gateway) -> Response:
    with gateway.budget.hold() as hold:
        body = (await read_request(request, gateway, DetokenizeRequest, hold)).body
        check_model(body.model, gateway.served)
        check_token_ids(body.tokens, gateway.served, "tokens")
        text = await gateway.pool.run(len(body.tokens), partial(gateway.tokenizer.decode, body.tokens))
        return json_response({"prompt": text})


def answer_health(gateway: Gateway) -> Response:
    """Liveness: 200 while the engine moves, busy or idle; 503 when it is stuck or dead."""
    gateway.switchboard.check_engine()
    return json_response({"status": "ok"})


def answer_ready(gateway: Gateway) -> Response:
    """Readiness: 200 when loaded, healthy and not draining. A full queue stays ready: it sheds with 503."""
    gateway.switchboard.check_ready()
    return json_response({"status": "ready"})


def answer_metrics(gateway: Gateway) -> Response:
    gateway.switchboard.refresh_metrics()
    return Response(gateway.metrics.render(), headers={"content-type": METRICS_MEDIA_TYPE})


def answer_version() -> Response:
    return json_response({"version": __version__})


def answer_load(gateway: Gateway) -> Response:
    gateway.switchboard.refresh_metrics()
    view = gateway.metrics.engine
    stats = view.stats
    blocks = stats.kv_blocks_used + stats.kv_blocks_cached + stats.kv_blocks_free
    return json_response(
        {
            "server_load": view.calls_open,
            "requests_running": stats.running,
            "requests_waiting": stats.waiting + view.desk_requests,
            "kv_usage_frac": stats.kv_blocks_used / blocks if blocks else 0.0,
        }
    )
