"""What every policy and every estimator is made of: options, a context, and events that it may observe."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from penstock.core.reasons import FinishReason, PinEvent
from penstock.core.request import ProgramKey
from penstock.policies.context import Context
from penstock.policies.view import CopyFacts, ReplicaView, SequenceView, StepFacts

FOREVER: Final = 1 << 60  # steps


class Observer:
    """Learns from what happens in one replica. Override what you need: a hook nobody overrides costs nothing.

    Hooks change nothing but the observer's own state, which must come out the same whether decode steps are
    told one by one or as a leap (`StepFacts.steps`): the twin leaps, the engine does not.
    """

    def attached(self, view: ReplicaView) -> None:
        """The replica that it serves, once, before all else. The window may be kept and looked through."""

    def submitted(self, sequence: SequenceView, now_s: float) -> None:
        """It entered the queue for the first time."""

    def started(self, sequence: SequenceView, now_s: float) -> None:
        """It got a slot and KV; `computed_len` of its tokens were found. Also when it comes back."""

    def decoding(self, sequence: SequenceView, now_s: float) -> None:
        """Its prompt is computed and a token is out; from now on it gets one token a step."""

    def stepped(self, step: StepFacts, now_s: float) -> None:
        """A plan was executed."""

    def copied(self, facts: CopyFacts, now_s: float) -> None:
        """A copy between device and host is done."""

    def left(self, sequence: SequenceView, now_s: float) -> None:
        """It gave its slot back: preempted, or about to be `finished`."""

    def finished(self, sequence: SequenceView, reason: FinishReason, now_s: float) -> None:
        """The one last event, also of a sequence that never started."""

    def pinned(self, program: ProgramKey, until_s: float, now_s: float) -> None:
        """A turn of `program` is about to end, and its KV stays until `until_s` (infinity: no end)."""

    def unpinned(self, program: ProgramKey, why: PinEvent, now_s: float) -> None:
        """The pin of `program` is gone; its blocks are kept like any others."""

    def steps_valid(self, view: ReplicaView, now_s: float) -> int:
        """For how many decode steps its answers surely stand if nothing happens. At least 1."""
        return FOREVER


HOOKS: Final = (
    "attached",
    "submitted",
    "started",
    "decoding",
    "stepped",
    "copied",
    "left",
    "finished",
    "pinned",
    "unpinned",
    "steps_valid",
)


@dataclass(frozen=True, slots=True)
class NoOptions:
    """A policy without settings."""


class Policy(Observer, ABC):
    """A named part of one slot. One object serves one replica and keeps its state to itself.

    `Options` is a frozen dataclass of `core.settings.setting` fields, filled from
    `[policies.options.NAME]`; its `__post_init__` may raise ConfigError. `conflicts` names policies of
    other slots that it cannot work beside, each with the reason; a stack with both is refused at start.
    """

    Options: ClassVar[type[Any]] = NoOptions
    conflicts: ClassVar[Mapping[str, str]] = {}

    def __init__(self, context: Context, options: Any) -> None:
        """Override to read `options`, an `Options` of this class, or to take estimators from `context`."""
