"""What request headers say about the caller: key, class of service, deadline."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from starlette.requests import Request

from penstock.core.errors import InvalidApiKey, InvalidRequest
from penstock.core.metrics import Slo
from penstock.core.settings import GatewaySettings

CLASS_HEADER = "x-penstock-class"
DEADLINE_HEADER = "x-penstock-deadline-ms"
DEADLINE_MS_MAX = 86_400_000


def check_key(request: Request, settings: GatewaySettings) -> None:
    """Raise InvalidApiKey unless the server is open or the bearer key is one of its keys."""
    if not settings.api_keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise InvalidApiKey("No API key was given.", hint="Send the header `Authorization: Bearer KEY`.")
    offered = given.strip().encode()
    # Every key is compared, in constant time, so that the time tells nothing about any of them.
    matches = [hmac.compare_digest(offered, key.encode()) for key in settings.api_keys]
    if not any(matches):
        raise InvalidApiKey("The API key is not known here.", hint="Check the key.")


def slo_class_of(request: Request, slos: Mapping[str, Slo]) -> str:
    """The class of service asked for; it must be one that the server defines."""
    name = request.headers.get(CLASS_HEADER)
    if name is None:
        return "default"
    if name not in slos:
        known = ", ".join(f"`{each}`" for each in slos) or "none"
        raise InvalidRequest(
            f"The class in `{CLASS_HEADER}` is not defined here.",
            hint=f"Defined: {known}.",
            param=CLASS_HEADER,
        )
    return name


def deadline_s_of(request: Request) -> float | None:
    """How long after its arrival the request may take, in seconds."""
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= DEADLINE_MS_MAX):
        raise InvalidRequest(
            f"`{DEADLINE_HEADER}` must be a whole number of milliseconds from 1 to {DEADLINE_MS_MAX}.",
            param=DEADLINE_HEADER,
        )
    return int(text) / 1e3
