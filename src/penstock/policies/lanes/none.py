"""One step loop: prompts and decodes share steps, as `compose` says."""

from __future__ import annotations

from penstock.policies.lanes import LANES, Batch, Lane, Lanes, Shares
from penstock.policies.view import ReplicaView


@LANES.register("none", source="continuous batching, Orca (OSDI 2022)")
class NoLanes(Lanes):
    """No lanes: one step at a time, on the whole device.

    Never asked, and costs nothing.
    """

    splits = False

    def shares(
        self, lane: Lane, prefill: Batch | None, decode: Batch | None, view: ReplicaView, now_s: float
    ) -> Shares:
        return Shares(1.0, 1.0)
