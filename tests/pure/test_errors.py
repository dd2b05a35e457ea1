"""The error catalogue, row by row: status, type, code and retry advice, as they go over the wire."""

from __future__ import annotations

import json

import pytest

from penstock.core import errors
from penstock.core.errors import PenstockError
from penstock.gateway.errors import error_headers, error_response

CATALOGUE: list[tuple[type[PenstockError], int, str, str | None, bool]] = [
    (errors.InvalidRequest, 400, "invalid_request_error", None, False),
    (errors.UnsupportedParameter, 400, "invalid_request_error", "unsupported_parameter", False),
    (errors.ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded", False),
    (errors.RequestExceedsCapacity, 400, "invalid_request_error", "request_exceeds_capacity", False),
    (errors.InvalidApiKey, 401, "invalid_request_error", "invalid_api_key", False),
    (errors.ModelNotAllowed, 403, "permission_error", "model_not_allowed", False),
    (errors.ModelNotFound, 404, "invalid_request_error", "model_not_found", False),
    (errors.RouteNotFound, 404, "invalid_request_error", "not_found", False),
    (errors.MethodNotAllowed, 405, "invalid_request_error", "method_not_allowed", False),
    (errors.RequestTimeout, 408, "invalid_request_error", "request_timeout", True),
    (errors.PayloadTooLarge, 413, "invalid_request_error", "payload_too_large", False),
    (errors.ObjectNotFound, 404, "invalid_request_error", "not_found", False),
    (errors.UnsupportedMediaType, 415, "invalid_request_error", "unsupported_media_type", False),
    (errors.HeadersTooLarge, 431, "invalid_request_error", "headers_too_large", False),
    (errors.RateLimitExceeded, 429, "rate_limit_error", "rate_limit_exceeded", True),
    (errors.ConcurrencyLimitExceeded, 429, "rate_limit_error", "concurrency_limit_exceeded", True),
    (errors.Overloaded, 503, "server_error", "overloaded", True),
    (errors.Draining, 503, "server_error", "draining", True),
    (errors.NoHealthyEngine, 503, "server_error", "no_healthy_engine", True),
    (errors.WarmingUp, 503, "server_error", "warming_up", True),
    (errors.DeadlineExceeded, 504, "server_error", "deadline_exceeded", False),
    (errors.InternalError, 500, "server_error", "internal_error", True),
]


@pytest.mark.parametrize(
    ("error", "status", "type_", "code", "retryable"), CATALOGUE, ids=lambda each: str(each)
)
def test_a_class_renders_its_row(
    error: type[PenstockError], status: int, type_: str, code: str | None, retryable: bool
) -> None:
    response = error_response(error("What happened.", hint="What to do.", param="field", retry_after_s=2.5))
    assert response.status_code == status
    assert json.loads(response.body) == {
        "error": {
            "message": "What happened. What to do.",
            "type": type_,
            "param": "field",
            "code": code,
        }
    }
    assert response.headers["x-should-retry"] == ("true" if retryable else "false")
    assert response.headers.get("retry-after") == ("3" if retryable else None)
    assert response.headers.get("retry-after-ms") == ("2500" if retryable else None)


def test_every_error_a_request_can_meet_has_a_row() -> None:
    branches = (errors.RequestError, errors.LimitError, errors.ServiceError)

    def leaves(branch: type[PenstockError]) -> set[type[PenstockError]]:
        below = branch.__subclasses__()
        return {branch} if not below else set().union(*(leaves(each) for each in below))

    assert set().union(*(leaves(branch) for branch in branches)) == {row[0] for row in CATALOGUE}


def test_what_may_work_later_always_names_a_delay() -> None:
    headers = error_headers(errors.Overloaded("Full."))
    assert int(headers["retry-after"]) >= 1 and int(headers["retry-after-ms"]) >= 1
