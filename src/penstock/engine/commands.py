"""What crosses the pipe between the gateway and its engine process, beside `replica/messages.py`."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.reasons import CancelReason
from penstock.core.request import Request
from penstock.replica.messages import Advice


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    reason: CancelReason


@dataclass(frozen=True, slots=True)
class Advise:
    advice: Advice


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class StageDone:
    """Progress while starting."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The engine could not start; the error crosses the pipe as it is."""

    error: Exception


Command = Submit | Cancel | Advise | Close
