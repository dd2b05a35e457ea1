"""The OpenAPI document. Bodies are read by hand (bounded), so the document is told here what they are."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from penstock.core.errors import (
    ConcurrencyLimitExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    ModelNotFound,
    NoHealthyEngine,
    PayloadTooLarge,
    PenstockError,
    RequestTimeout,
    UnsupportedMediaType,
)
from penstock.gateway import schema_out as out
from penstock.gateway.batches.schema import BatchRequest
from penstock.gateway.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

REQUEST_MODELS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    BatchRequest,
)
ANSWER_MODELS: tuple[type[BaseModel], ...] = (
    out.ErrorBody,
    out.ChatCompletion,
    out.ChatCompletionChunk,
    out.Completion,
    out.CompletionChunk,
    out.ModelList,
    out.ModelCard,
    out.Tokenized,
    out.Detokenized,
    out.Health,
    out.Readiness,
    out.VersionBody,
    out.Load,
    out.PinReleased,
    out.FileObject,
    out.FileList,
    out.FileDeleted,
    out.BatchObject,
    out.BatchList,
)
KEYED_ERRORS = (InvalidApiKey, InternalError)
BODY_ERRORS = (
    InvalidRequest,
    ModelNotFound,
    RequestTimeout,
    PayloadTooLarge,
    UnsupportedMediaType,
    NoHealthyEngine,
)
GENERATION_ERRORS = (*BODY_ERRORS, ConcurrencyLimitExceeded, DeadlineExceeded)


def describe(
    answer: type[BaseModel] | None,
    *errors: type[PenstockError],
    body: type[BaseModel] | None = None,
    chunk: type[BaseModel] | None = None,
    is_keyed: bool = False,
) -> dict[str, Any]:
    """The `openapi_extra` of a route: its body, its answers and its errors, by reference."""
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        content = {"application/json": {"schema": _ref(answer)}}
    if chunk is not None:
        note = f"A {chunk.__name__} as JSON, or an ErrorBody if it fails midway; `[DONE]` in the last event."
        data = {"type": "string", "description": note}
        content["text/event-stream"] = {
            "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}
        }
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    for error in (*errors, *(KEYED_ERRORS if is_keyed else (InternalError,))):
        responses[str(error.status)] = {
            "description": (error.__doc__ or "").strip(),
            "content": {"application/json": {"schema": _ref(out.ErrorBody)}},
        }
    extra: dict[str, Any] = {"responses": responses}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    if is_keyed:
        extra["security"] = [{"bearer": []}, {}]
    return extra


def complete(document: dict[str, Any], model: str) -> dict[str, Any]:
    """Add the schemas that the routes refer to, the key scheme, and the one model's name."""
    models = [(model, "validation") for model in REQUEST_MODELS]
    models += [(model, "serialization") for model in ANSWER_MODELS]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components = document.setdefault("components", {})
    components["schemas"] = definitions["$defs"]
    for request in REQUEST_MODELS:
        _name_model(components["schemas"][request.__name__], model)
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # the framework's own; every error here has our shape
    return document


def _name_model(schema: dict[str, Any], model: str) -> None:
    """In a request's schema: the value that `model` may have, also in the examples."""
    described = schema["properties"].get("model")
    if described is None:
        return
    named = next((each for each in described.get("anyOf", ()) if each.get("type") == "string"), described)
    named["enum"] = [model]
    for example in schema["examples"]:
        if "model" in example:
            example["model"] = model


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
