"""Every error Penstock raises for the world, as one tree.

    PenstockError
    ├── RequestError            the request is wrong, retrying cannot help (4xx)
    │   ├── InvalidRequest          a field is malformed or out of range
    │   ├── UnsupportedParameter    a valid OpenAI field this build cannot honour yet
    │   ├── ContextLengthExceeded   prompt + output exceed the model's context
    │   ├── RequestExceedsCapacity  fits the context, but never fits the KV pool
    │   ├── InvalidApiKey           missing or unknown key
    │   ├── ModelNotAllowed         the key may not use this model
    │   ├── ModelNotFound           no such model is served here
    │   ├── PayloadTooLarge         the body exceeds the limit
    │   ├── HeadersTooLarge         request line and headers exceed the limit
    │   ├── UnsupportedMediaType    the body is not declared as JSON
    │   ├── RouteNotFound           no such path
    │   ├── ObjectNotFound          no such file or batch of the caller's
    │   ├── MethodNotAllowed        the path exists, the method does not
    │   └── RequestTimeout          the body did not arrive in time
    ├── LimitError              the caller's own limit; later may work (429)
    │   ├── RateLimitExceeded
    │   └── ConcurrencyLimitExceeded
    ├── ServiceError            our state, not the caller's fault (5xx)
    │   ├── Overloaded              a bounded queue is full
    │   ├── Draining                shutting down
    │   ├── NoHealthyEngine         the engine died or is stuck
    │   ├── WarmingUp               still loading
    │   ├── DeadlineExceeded        not done within the request's deadline
    │   └── InternalError           a bug of ours
    ├── ConfigError             a config file, flag or environment value is wrong
    ├── ModelError              a model cannot be found, read or run
    │   ├── ModelNotAvailable       not in the catalogue, the folder, or reachable
    │   ├── ModelFileDamaged        truncated, lying or malformed file
    │   └── ModelUnsupported        architecture or tensor type we do not implement
    ├── TraceError              a workload trace cannot be read
    ├── SloInfeasible           a target that no single request can meet on this hardware
    └── EnvironmentMissing      a package, device or file this command needs is absent

An assertion in this code base marks a bug of ours; one of these marks the world's. Each carries a
one-sentence message and a `hint` that names the way out. The wire form (`API.md`, "Errors") is
rendered from the class attributes, so status, type and code cannot drift apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from penstock.core.reasons import ShedReason


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of `known`, for a hint; empty where none is near."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return "Did you mean " + " or ".join(f"`{item}`" for item in close) + "?" if close else ""


class PenstockError(Exception):
    """Root. `message` says what happened, `hint` what to do about it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        reason: ShedReason | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after_s = retry_after_s
        self.reason = reason  # why the desk refused, for the metrics

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message

    def wire(self) -> dict[str, dict[str, str | None]]:
        """The body of an error answer, exactly as the OpenAI client expects it."""
        message = f"{self.message} {self.hint}" if self.hint else self.message
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


class RequestError(PenstockError):
    """The request itself is wrong."""

    status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = None


class InvalidRequest(RequestError):
    """A field is malformed or out of range; `param` names it."""


class UnsupportedParameter(RequestError):
    """A field that OpenAI defines and this build cannot honour."""

    code = "unsupported_parameter"


class ContextLengthExceeded(RequestError):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class RequestExceedsCapacity(RequestError):
    """The request fits the context but could never fit this replica's KV pool."""

    code = "request_exceeds_capacity"


class InvalidApiKey(RequestError):
    """No key, or one we do not know."""

    status = 401
    code = "invalid_api_key"


class ModelNotAllowed(RequestError):
    """The key is known but may not use the model."""

    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    status = 404
    code = "model_not_found"


class PayloadTooLarge(RequestError):
    """The request body is larger than the gateway reads."""

    status = 413
    code = "payload_too_large"


class HeadersTooLarge(RequestError):
    """Request line and headers are larger than the gateway reads."""

    status = 431
    code = "headers_too_large"


class UnsupportedMediaType(RequestError):
    """The body is declared as something else than JSON."""

    status = 415
    code = "unsupported_media_type"


class RouteNotFound(RequestError):
    """No such path."""

    status = 404
    code = "not_found"


class ObjectNotFound(RequestError):
    """No file or batch of that id belongs to the caller."""

    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(RequestError):
    """The request body did not arrive in time; sending it again may work."""

    status = 408
    code = "request_timeout"
    retryable = True


class LimitError(PenstockError):
    """The caller's own limit; the same request may be served later."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class RateLimitExceeded(LimitError):
    """Too many requests or tokens per minute."""


class ConcurrencyLimitExceeded(LimitError):
    """Too many requests of one tenant at once."""

    code = "concurrency_limit_exceeded"


class ServiceError(PenstockError):
    """Our state, not the caller's fault."""

    status = 503
    retryable = True


class Overloaded(ServiceError):
    """A bounded queue is full."""

    code = "overloaded"


class Draining(ServiceError):
    """The server is shutting down and takes no new work."""

    code = "draining"


class NoHealthyEngine(ServiceError):
    """The engine process died, or has stopped making steps."""

    code = "no_healthy_engine"


class WarmingUp(ServiceError):
    """The model is still loading."""

    code = "warming_up"


class DeadlineExceeded(ServiceError):
    """The request was not done within its deadline."""

    status = 504
    code = "deadline_exceeded"
    retryable = False


class InternalError(ServiceError):
    """A bug of ours; the message carries the request id and no stack trace."""

    status = 500
    code = "internal_error"


class ConfigError(PenstockError):
    """A config file, an environment value or a flag is wrong."""


class ModelError(PenstockError):
    """A model cannot be found, read or run."""


class ModelNotAvailable(ModelError):
    """The name is unknown, or the files cannot be had."""


class ModelFileDamaged(ModelError):
    """A model file is truncated, malformed, or its header lies."""


class ModelUnsupported(ModelError):
    """An architecture, tensor type or option that the engine does not implement."""


class TraceError(PenstockError):
    """A workload trace cannot be read."""


class SloInfeasible(PenstockError):
    """A latency target that one request alone misses on the given hardware."""


class EnvironmentMissing(PenstockError):
    """A package, device or file that the command needs is absent."""
