"""What request headers say about the caller: key, tenant, class of service, deadline."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.requests import Request

from penstock.core.errors import InvalidApiKey, InvalidRequest
from penstock.core.settings import GatewaySettings

CLASS_HEADER = "x-penstock-class"
OBJECTIVE_HEADER = "x-gateway-inference-objective"  # the same, in the words of the Gateway API
NAME_CHARS_MAX = 200  # as in the request log
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


def tenant_of(request: Request, settings: GatewaySettings) -> str:
    """Whom the request is served for: what the header says that the operator trusts, else `default`."""
    header = settings.tenant_header
    name = request.headers.get(header) if header else None
    return "default" if name is None else checked_name(name, header)


def slo_class_of(request: Request, classes: Collection[str]) -> str:
    """The class of service asked for; it must be one of `classes`, those that the server defines.

    A server that defines none passes on what a gateway calls the objective, as a label.
    """
    asked = {header: request.headers.get(header) for header in (CLASS_HEADER, OBJECTIVE_HEADER)}
    given = {header: name for header, name in asked.items() if name is not None}
    if len(set(given.values())) > 1:
        raise InvalidRequest(
            f"`{CLASS_HEADER}` and `{OBJECTIVE_HEADER}` name different classes.",
            hint="Send one of them.",
            param=OBJECTIVE_HEADER,
        )
    for header, name in given.items():
        if name in classes or name == "default":
            continue
        if header == OBJECTIVE_HEADER and not classes:
            return checked_name(name, header)
        known = ", ".join(f"`{each}`" for each in sorted(classes)) or "none"
        raise InvalidRequest(
            f"The class in `{header}` is not defined here.", hint=f"Defined: {known}.", param=header
        )
    return next(iter(given.values()), "default")


def checked_name(name: str, header: str, chars_max: int = NAME_CHARS_MAX) -> str:
    """The name that a header gives. Raises InvalidRequest."""
    if not 1 <= len(name) <= chars_max or not name.isascii() or not name.isprintable():
        raise InvalidRequest(f"`{header}` must be 1 to {chars_max} printable ASCII characters.", param=header)
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
