"""Keep a program's KV pinned while its tool runs, for as long as that is likely to pay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.estimate.gaps import GapBelief, GapSamples
from penstock.policies.estimate.turn_costs import TurnCosts
from penstock.policies.retain import RETAIN
from penstock.policies.retain.lru import Lru
from penstock.policies.view import ReplicaView, SequenceView

PIN_S_MIN: Final = 0.01  # a shorter pin is not worth its books (public preview)
COLD_PIN_S: Final = 2.0  # with too few gaps to know, and the mean rule's constant


@dataclass(frozen=True, slots=True)
class ContinuumOptions:
    """`[policies.options.continuum]`."""

    rule: str = setting(
        "cdf",
        "`cdf`: as long as the tool's gaps say that it pays; `mean`: 2 s unless its mean gap is longer; "
        "`forever`: until the room is needed",
        choices=("cdf", "mean", "forever"),
    )
    slack_frac: float = setting(
        0.1,
        "share by which a pin outlasts the gap that `cdf` chose: gaps repeat, but not exactly",
        low=0.0,
        high=10.0,
    )
    pin_s_max: float = setting(300.0, "longest pin, also when a client asks, seconds", low=0.0, high=86_400.0)


@RETAIN.register("continuum", source="Continuum (arXiv 2511.02230): KV time-to-live, section 4")
class Continuum(Lru):
    """Pin the KV of a turn that another will follow, until its time to live ends; else drop what is oldest.

    With F the distribution of the gaps of the tool called, B what a hit saves and c what holding costs, the
    pin lasts for the τ among the observed gaps (or 0) with the largest F(τ)·B − c·E[min(gap, τ)], in
    seconds of delay. B = reload + queue delay, for the program itself, + device time of the reload × requests
    that wait, which a reload delays; c = share of the KV memory held × requests that wait. The formula
    reconstructs the paper's. That a reload delays the others too is ours: without it a long queue would
    forbid every pin. The public preview has the `mean` rule only. A request's own `pin_s` overrides the
    rule, and a last turn pins nothing.

    Reads the request's hints, `block_count`, `computed_len` and `waiting_count`. O(gap samples) a turn.
    """

    Options = ContinuumOptions
    pins = True

    def __init__(self, context: Context, options: Any) -> None:
        super().__init__(context, options)
        self._options: ContinuumOptions = options
        self._gaps = context.shared(GapBelief)
        self._costs = context.shared(TurnCosts)

    def turn_ended(self, sequence: SequenceView, view: ReplicaView, now_s: float) -> float | None:
        if sequence.request.pin_s is not None:
            pin_s = min(sequence.request.pin_s, self._options.pin_s_max)
        elif self._options.rule == "forever":
            pin_s = math.inf
        elif self._options.rule == "mean":
            pin_s = min(self._mean_rule_s(sequence.request.tool), self._options.pin_s_max)
        else:
            pin_s = min(self._cdf_rule_s(sequence, view), self._options.pin_s_max)
        return now_s + pin_s if pin_s > PIN_S_MIN else None

    def _mean_rule_s(self, tool: str | None) -> float:
        gaps = self._gaps.own(tool)
        return 0.0 if gaps is not None and gaps.mean_s > COLD_PIN_S else COLD_PIN_S

    def _cdf_rule_s(self, sequence: SequenceView, view: ReplicaView) -> float:
        gaps = self._gaps.of(sequence.request.tool)
        if gaps is None:
            return COLD_PIN_S
        costs, tokens, waiting = self._costs, sequence.computed_len, view.waiting_count
        saved_s = costs.reload_s(tokens) + costs.queue_delay_s + costs.reload_device_s(tokens) * waiting
        held_frac = sequence.block_count / view.block_count
        return best_pin_s(gaps, saved_s, held_frac * waiting) * (1.0 + self._options.slack_frac)


def best_pin_s(gaps: GapSamples, saved_s: float, cost_rate: float) -> float:
    """The τ in {0} ∪ gaps that maximises F(τ)·saved − cost_rate·E[min(gap, τ)]; the shortest of equals.

    `saved_s`: seconds of delay that a hit saves. `cost_rate`: seconds of delay inflicted a second of
    holding. O(gaps).
    """
    best_s, best_gain_s = 0.0, 0.0
    for gap_s, within, held_s in gaps.outcomes():
        gain_s = within * saved_s - cost_rate * held_s
        if gain_s > best_gain_s:
            best_s, best_gain_s = gap_s, gain_s
    return best_s
