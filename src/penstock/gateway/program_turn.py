"""What a call says of the program it is a turn of: in its body, or in headers where a body cannot change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from penstock.core.errors import InvalidRequest, UnsupportedParameter
from penstock.gateway.access import checked_name
from penstock.gateway.schema import NAME_CHARS_MAX, PIN_S_MAX, TOOL_CHARS_MAX, Generation

PROGRAM_HEADER: Final = "x-penstock-program-id"
LAST_HEADER: Final = "x-penstock-last-step"
TOOL_HEADER: Final = "x-penstock-tool"
PIN_HEADER: Final = "x-penstock-pin-s"
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class ProgramTurn:
    """Hints: they change when something is computed, never what."""

    program_id: str | None = None
    is_last: bool = False
    tool: str | None = None
    pin_s: float | None = None


NO_PROGRAM: Final = ProgramTurn()


def turn_of(headers: Mapping[str, str], body: Generation, keeps_pins: bool) -> ProgramTurn:
    """Body and headers together. Raises RequestErrors that name the field or the header."""
    program_id = _one(body.program_id, _name(headers, PROGRAM_HEADER, NAME_CHARS_MAX), PROGRAM_HEADER)
    is_last = _one(body.is_last_step, _boolean(headers, LAST_HEADER), LAST_HEADER)
    tool = _one(body.tool, _name(headers, TOOL_HEADER, TOOL_CHARS_MAX), TOOL_HEADER)
    pin_s = _one(body.pin_s, _seconds(headers, PIN_HEADER), PIN_HEADER)
    if pin_s is not None:
        _check_pin(headers, body, program_id, bool(is_last), keeps_pins)
    return ProgramTurn(program_id, bool(is_last), tool, pin_s)


def _check_pin(
    headers: Mapping[str, str], body: Generation, program_id: str | None, is_last: bool, keeps_pins: bool
) -> None:
    param = PIN_HEADER if body.pin_s is None else "pin_s"
    if not keeps_pins:
        raise UnsupportedParameter(
            f"`{param}` has no effect under this server's `retain` policy.",
            hint="Leave it out, or start the server with the preset `continuum`.",
            param=param,
        )
    if program_id is None and body.session_id is None:
        raise InvalidRequest(
            f"`{param}` is given without a program to keep KV for.",
            hint="Send `program_id` or `session_id` too, the same in each turn.",
            param=param,
        )
    if is_last:
        raise InvalidRequest(
            f"`{param}` is given for a last step, which nothing follows.",
            hint="Send one of them.",
            param=param,
        )


def _one(in_body: Any, in_header: Any, header: str) -> Any:
    """The value that is given; both may be when they say the same."""
    if in_body is not None and in_header is not None and in_body != in_header:
        raise InvalidRequest(f"`{header}` and the body do not say the same.", hint="Send one.", param=header)
    return in_header if in_body is None else in_body


def _name(headers: Mapping[str, str], header: str, chars_max: int) -> str | None:
    value = headers.get(header)
    return None if value is None else checked_name(value, header, chars_max)


def _boolean(headers: Mapping[str, str], header: str) -> bool | None:
    value = headers.get(header)
    if value is None:
        return None
    if value.lower() not in _BOOLEANS:
        raise InvalidRequest(f"`{header}` must be `true` or `false`.", param=header)
    return _BOOLEANS[value.lower()]


def _seconds(headers: Mapping[str, str], header: str) -> float | None:
    value = headers.get(header)
    if value is None:
        return None
    try:
        seconds = float(value) if len(value) <= 16 and value.isascii() else -1.0
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= PIN_S_MAX:  # false for NaN too
        raise InvalidRequest(f"`{header}` must be seconds from 0 to {PIN_S_MAX}.", param=header)
    return seconds
