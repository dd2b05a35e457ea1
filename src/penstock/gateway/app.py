"""The HTTP application: routes, error handlers, and the parts behind them put together."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from penstock import __version__
from penstock.core.errors import (
    ModelNotFound,
    NoHealthyEngine,
    PenstockError,
    UnsupportedParameter,
)
from penstock.core.settings import Settings
from penstock.desk import Capacity, Desk
from penstock.gateway import generate, plain
from penstock.gateway import schema_out as out
from penstock.gateway.batches.routes import BatchApi, add_batch_routes
from penstock.gateway.batches.store import BatchStore
from penstock.gateway.convert import Served
from penstock.gateway.dashboard import answer_dashboard
from penstock.gateway.drift import PredictStep
from penstock.gateway.edge import Edge
from penstock.gateway.errors import error_response, from_http_exception
from penstock.gateway.metrics import GatewayMetrics
from penstock.gateway.openapi import BODY_ERRORS, GENERATION_ERRORS, complete, describe
from penstock.gateway.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from penstock.gateway.state import Gateway
from penstock.gateway.switchboard import OutcomeHook, Recorder, Switchboard
from penstock.gateway.text import MakeDetokenizer, Template, Tokenizer
from penstock.models.detokenize import IncrementalDetokenizer
from penstock.policies.stack import rank_class, rank_classes, retain_class
from penstock.replica.messages import ReplicaInfo, ReplicaLink

CLIENT_CLOSED_STATUS = 499  # nobody reads it; it marks the case in logs


def create_app(
    link: ReplicaLink,
    tokenizer: Tokenizer,
    template: Template,
    settings: Settings,
    *,
    on_outcome: OutcomeHook | None = None,
    recorder: Recorder | None = None,
    predict_step: PredictStep | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """An application in front of one ready replica.

    `on_outcome` is called on the event loop with the outcome of every request and the request itself, once;
    it must not block. `recorder` gets the same, and the output's tokens. `predict_step` is what the
    engine's own steps are compared with. The running parts are at `app.state.gateway`.
    """
    gateway = _make_gateway(link, tokenizer, template, settings, on_outcome, recorder, predict_step, clock)

    store = None
    if settings.batch.folder:
        store = BatchStore(Path(settings.batch.folder), settings.batch, time.time)
    batches = BatchApi(gateway, store, time.time)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway.switchboard.start()
        batches.start()
        yield
        await batches.stop()
        await gateway.switchboard.stop()
        gateway.pool.close()

    app = FastAPI(
        title="Penstock",
        version=__version__,
        description="OpenAI-compatible serving of one model; see `docs/api.md`.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.gateway = gateway
    app.add_middleware(Edge, clock=clock)
    _add_error_handlers(app, gateway)
    _add_generation_routes(app, gateway)
    _add_text_routes(app, gateway)
    add_batch_routes(app, batches)
    _add_status_routes(app, gateway)
    app.openapi = _openapi_of(app, gateway.served.model)  # type: ignore[method-assign]
    return app


def _make_gateway(
    link: ReplicaLink,
    tokenizer: Tokenizer,
    template: Template,
    settings: Settings,
    on_outcome: OutcomeHook | None,
    recorder: Recorder | None,
    predict_step: PredictStep | None,
    clock: Callable[[], float],
) -> Gateway:
    info = link.info
    served = _served(info, tokenizer, settings)
    weights = {name: tenant.weight for name, tenant in settings.tenants.items()}
    metrics = GatewayMetrics(info, settings.slo, predict_step, weights)
    desk = Desk(settings.desk, served.capacity)
    return Gateway(
        settings=settings,
        info=info,
        served=served,
        tokenizer=tokenizer,
        template=template,
        make_detokenizer=_detokenizer_maker(tokenizer),
        switchboard=Switchboard(link, desk, settings.gateway, metrics, clock, on_outcome, recorder),
        metrics=metrics,
        clock=clock,
        started_s=int(time.time()),
    )


def _served(info: ReplicaInfo, tokenizer: Tokenizer, settings: Settings) -> Served:
    rank = rank_class(info.policies["rank"])
    return Served(
        model=settings.served_model_name or info.model,
        capacity=Capacity(
            context_len_max=info.context_len_max,
            kv_block_tokens=info.kv_block_tokens,
            kv_blocks=info.kv_blocks,
            running_max=info.running_max,
            takes_queue=rank.reorders,
        ),
        vocab_size=tokenizer.vocab_size,
        eos_ids=frozenset(tokenizer.eos_ids),
        choices_max=settings.gateway.choices_max,
        is_priority_ranked=rank.reads_priority,
        keeps_pins=retain_class(info.policies.get("retain", "lru")).pins,
        classes=frozenset(settings.slo) | rank_classes(settings.policies),
    )


def _detokenizer_maker(tokenizer: Tokenizer) -> MakeDetokenizer:
    def make(stops: tuple[str, ...], continues_prompt: bool) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(cast(Any, tokenizer), stop=stops, continues_text=continues_prompt)

    return make


def _add_error_handlers(app: FastAPI, gateway: Gateway) -> None:
    async def on_our_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PenstockError)
        gateway.metrics.refused(error.status, error.code)
        return error_response(error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        ours = from_http_exception(error, request.method, request.url.path)
        gateway.metrics.refused(ours.status, ours.code)
        return error_response(ours, error.headers)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_STATUS)

    app.add_exception_handler(PenstockError, on_our_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_disconnect)


def _add_generation_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        response_model=None,
        openapi_extra=describe(
            out.ChatCompletion,
            *GENERATION_ERRORS,
            body=ChatRequest,
            chunk=out.ChatCompletionChunk,
            is_keyed=True,
        ),
    )
    async def chat_completions(request: Request) -> Response:
        return await generate.answer_chat(request, gateway)

    @app.post(
        "/v1/completions",
        summary="Continue one or many prompts",
        response_model=None,
        openapi_extra=describe(
            out.Completion,
            *GENERATION_ERRORS,
            body=CompletionRequest,
            chunk=out.CompletionChunk,
            is_keyed=True,
        ),
    )
    async def completions(request: Request) -> Response:
        return await generate.answer_completion(request, gateway)


def _add_text_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models", summary="List the models", openapi_extra=describe(out.ModelList, is_keyed=True))
    async def models(request: Request) -> Response:
        return plain.answer_models(request, gateway)

    @app.get(
        "/v1/models/{model:path}",
        summary="Describe one model",
        openapi_extra=describe(out.ModelCard, ModelNotFound, is_keyed=True),
    )
    async def model_card(request: Request, model: str) -> Response:
        return plain.answer_model(request, gateway, model)

    @app.delete(
        "/v1/pins/{program_id:path}",
        summary="Let a program's pinned KV go",
        openapi_extra=describe(out.PinReleased, UnsupportedParameter, is_keyed=True),
    )
    async def unpin(request: Request, program_id: str) -> Response:
        return plain.answer_unpin(request, gateway, program_id)

    @app.post(
        "/tokenize",
        summary="Text or messages to token ids",
        openapi_extra=describe(out.Tokenized, *BODY_ERRORS, body=TokenizeRequest, is_keyed=True),
    )
    async def tokenize(request: Request) -> Response:
        return await plain.answer_tokenize(request, gateway)

    @app.post(
        "/detokenize",
        summary="Token ids to text",
        openapi_extra=describe(out.Detokenized, *BODY_ERRORS, body=DetokenizeRequest, is_keyed=True),
    )
    async def detokenize(request: Request) -> Response:
        return await plain.answer_detokenize(request, gateway)


def _add_status_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/", include_in_schema=False)
    async def dashboard() -> Response:
        return answer_dashboard()

    @app.get("/health", summary="Is the engine alive", openapi_extra=describe(out.Health, NoHealthyEngine))
    async def health() -> Response:
        return plain.answer_health(gateway)

    @app.get(
        "/ready", summary="May traffic be sent here", openapi_extra=describe(out.Readiness, NoHealthyEngine)
    )
    async def ready() -> Response:
        return plain.answer_ready(gateway)

    @app.get("/metrics", summary="Prometheus metrics", openapi_extra=describe(None))
    async def metrics() -> Response:
        return plain.answer_metrics(gateway)

    @app.get("/version", summary="The server's version", openapi_extra=describe(out.VersionBody))
    async def version() -> Response:
        return plain.answer_version()

    @app.get("/load", summary="What is in flight", openapi_extra=describe(out.Load))
    async def load() -> Response:
        return plain.answer_load(gateway)


def _openapi_of(app: FastAPI, model: str) -> Callable[[], dict[str, Any]]:
    """The framework's document with our schemas in it, made once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            app.openapi_schema = complete(document, model)
        return app.openapi_schema

    return openapi
