"""Fixed shares of the device for prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.lanes import FLOOR, LANES, Batch, Lane, Lanes, Shares
from penstock.policies.view import ReplicaView


@dataclass(frozen=True, slots=True)
class StaticOptions:
    prefill_frac: float = setting(0.5, "share of the device for the prefill lane", low=FLOOR, high=1.0)
    decode_frac: float = setting(0.5, "share for the decode lane; both may be 1", low=FLOOR, high=1.0)


@LANES.register(
    "static", source="released code of semi-PD (arXiv 2504.19867): shares by environment variables"
)
class StaticLanes(Lanes):
    """Two lanes whose shares never change, whatever comes.

    A lane keeps to its share also while the other one idles, as a process with a fixed quota does. O(1).
    """

    Options = StaticOptions

    def __init__(self, context: Context, options: StaticOptions) -> None:
        self._shares = Shares(options.prefill_frac, options.decode_frac)

    def shares(
        self, lane: Lane, prefill: Batch | None, decode: Batch | None, view: ReplicaView, now_s: float
    ) -> Shares:
        return self._shares
