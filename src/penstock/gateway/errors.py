"""Everything that can go wrong, in the one shape that OpenAI's clients read.

The body is `{"error": {message, type, param, code}}`; status, type and code come from the error's class. What
may work later says when to come back (`Retry-After`, `retry-after-ms`), and every error says whether retrying
can help at all (`x-should-retry`), because the clients obey both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from penstock.core.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    PenstockError,
    RouteNotFound,
)

RETRY_AFTER_S_DEFAULT = 1.0
VALUE_CHARS_SHOWN = 40


def error_headers(error: PenstockError) -> dict[str, str]:
    """Retry advice: a delay for what may work later, and a plain no for what will not."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retryable:
        delay_s = error.retry_after_s or RETRY_AFTER_S_DEFAULT
        headers["retry-after"] = str(math.ceil(delay_s))
        headers["retry-after-ms"] = str(math.ceil(delay_s * 1e3))
    return headers


def error_response(error: PenstockError, extra_headers: Mapping[str, str] | None = None) -> Response:
    """The whole answer for an error raised before anything was sent."""
    return Response(
        orjson.dumps(error.wire()),
        status_code=error.status,
        headers={**error_headers(error), **(extra_headers or {})},
        media_type="application/json",
    )


def internal_error(request_id: str) -> InternalError:
    """What the client learns of a bug of ours: the id to look for in the log, and no stack trace."""
    return InternalError(
        f"The server failed to answer request `{request_id}`.",
        hint="This is a bug of the server; report it with the request id.",
    )


def from_http_exception(error: HTTPException, method: str, path: str) -> PenstockError:
    """The framework's own 404 and 405, in our shape."""
    if error.status_code == 404:
        return RouteNotFound(f"There is no `{path[:100]}` here.", hint="See `/openapi.json` for the paths.")
    if error.status_code == 405:
        return MethodNotAllowed(
            f"`{path[:100]}` does not take `{method[:20]}`.", hint="See the `Allow` header."
        )
    return InvalidRequest(str(error.detail))


def from_validation(error: ValidationError, payload: Mapping[str, Any]) -> InvalidRequest:
    """The first thing wrong, with its path in the client's own words: `messages[0].content`."""
    details = error.errors(include_url=False, include_context=False)
    path = _path_in(payload, details[0]["loc"])
    # Members of a union each report; the one that got furthest into the value knows best.
    deepest = max(details, key=lambda detail: _depth_below(path, _path_in(payload, detail["loc"])))
    path = _path_in(payload, deepest["loc"])
    if deepest["type"] == "missing":
        return InvalidRequest(f"`{path}` is required.", param=path)
    reason = deepest["msg"][:1].lower() + deepest["msg"][1:]
    return InvalidRequest(f"`{path}`: {reason} (got {_shown(deepest['input'])}).", param=path)


def _depth_below(path: str, other: str) -> int:
    return len(other) if other.startswith(path) else -1


def _path_in(payload: Any, loc: Sequence[str | int]) -> str:
    """The parts of `loc` that exist in the payload; pydantic puts names of union members between them."""
    path = ""
    here = payload
    for position, part in enumerate(loc):
        if isinstance(here, Mapping) and (part in here or position == len(loc) - 1):
            path += f".{part}" if path else str(part)
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path += f"[{part}]"
            here = here[part]
    return path


def _shown(value: Any) -> str:
    """A short, safe rendering of the value that was refused."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    if isinstance(value, str) and len(value) > VALUE_CHARS_SHOWN:
        return f"a string of {len(value)} characters"
    return orjson.dumps(value, default=repr).decode()
