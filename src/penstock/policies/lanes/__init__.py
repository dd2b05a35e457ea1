"""Slot `lanes`: whether prefill and decode run beside each other, and on which shares of the device.

With lanes a replica has two step loops over one KV pool: the prefill lane computes prompts, the decode lane
gives every decoding sequence its next token. Blocks stay where they are when a sequence changes lanes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Final

from penstock.policies.base import Policy
from penstock.policies.registry import Registry
from penstock.policies.view import ReplicaView

FLOOR: Final = 0.1  # of the device: an active lane never gets less


class Lane(Enum):
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Lane:
        return Lane.DECODE if self is Lane.PREFILL else Lane.PREFILL


@dataclass(frozen=True, slots=True)
class Batch:
    """One step of one lane, reduced to what its time depends on.

    `prefills` are (new tokens, context after them); `decode_context` counts the new tokens as well.
    """

    prefills: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    decode_context: int = 0

    @property
    def rows(self) -> int:
        return self.decodes + sum(new for new, _ in self.prefills)


@dataclass(frozen=True, slots=True)
class Shares:
    """Fractions of the device's compute units, each above 0 and at most 1.

    Together they may exceed 1: while both lanes compute, the device then gives each its part of the sum.
    """

    prefill: float
    decode: float

    def of(self, lane: Lane) -> float:
        return self.prefill if lane is Lane.PREFILL else self.decode


class Lanes(Policy):
    """Shares of the device. `splits`: whether there are two lanes at all."""

    splits: ClassVar[bool] = True

    @property
    def switch_s(self) -> float:
        """From asking for other shares until a lane can begin a step on them; meanwhile the old serve."""
        return 0.0

    @abstractmethod
    def shares(
        self, lane: Lane, prefill: Batch | None, decode: Batch | None, view: ReplicaView, now_s: float
    ) -> Shares:
        """Asked when `lane` is about to begin a step, once for all steps of a decode plan that stands.

        The batches are what each lane computes now or is about to; None: it has nothing to do.
        """


LANES: Registry[Lanes] = Registry("lanes")
