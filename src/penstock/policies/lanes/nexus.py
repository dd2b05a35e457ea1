"""Predictive shares: before each prefill step, the split that serves the scarcer thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.core.phase_profile import PhaseProfile
from penstock.core.settings import setting
from penstock.policies.context import Context
from penstock.policies.lanes import FLOOR, LANES, Batch, Lane, Lanes, Shares
from penstock.policies.lanes.phase_model import PhaseModel
from penstock.policies.view import ReplicaView

EVALUATIONS_MAX: Final = 6
# Of Llama-3-8B on one H100, by the twin's roofline: where nobody has swept the device that serves.
ASSUMED: Final = PhaseProfile(
    step_s=1.2e-3,
    sequence_s=7e-6,
    row_s=2.0e-5,
    weights_s=5.4e-3,
    pair_s=8.5e-10,
    context_s=4.0e-8,
    compute_knee=0.9,
    compute_slope=0.5,
    memory_knee=0.4,
    memory_slope=0.1,
    contention=1.0,
    error_frac=0.5,
    source="assumed",
)


@dataclass(frozen=True, slots=True)
class NexusOptions:
    kv_switch_frac: float = setting(
        0.7, "KV in use from which decode is favoured: drain memory first", low=0.0, high=1.0
    )
    prefill_slack_frac: float = setting(
        1.0, "how much slower a prompt may become while decode is favoured", low=0.0, high=100.0
    )
    decode_slack_frac: float = setting(
        1.0, "how much slower a decode step may become while prompts are favoured", low=0.0, high=100.0
    )
    step_frac: float = setting(0.1, "step of the search, of the device", low=0.01, high=0.5)
    dead_band_frac: float = setting(0.05, "smaller changes are not made", low=0.0, high=0.5)
    switch_s: float = setting(0.0, "until other shares are ready", low=0.0, high=600.0)
    saturation: bool = setting(True, "model that speed saturates with the share; for ablations")
    contention: bool = setting(True, "model that lanes share bandwidth; for ablations")


@LANES.register(
    "nexus", source="Nexus (arXiv 2507.06608); constants and the curve's form are a reconstruction"
)
class Nexus(Lanes):
    """Predict both lanes' times for the batches at hand, and give the favoured lane all the other can spare.

    With KV to spare prompts are favoured: the largest prefill share at which a decode step takes at most
    1 + slack of its time on the whole device. With KV in use beyond `kv_switch_frac` it is the other way
    round. A greedy search from the present split asks the model at most six times. Decided when a prefill
    step begins and decodes are there; between, the split stands, so leaps change nothing. A lane whose
    partner has nothing to do gets the whole device. The model comes from a sweep of the device
    (`core/phase_profile.py`), which the twin makes. O(1) a step.

    Slacks of 0.3, with which the reconstruction begins, leave the favoured lane the smaller part: a prompt
    loses 30 % of its speed with a quarter of the device. Hence 1.
    """

    Options = NexusOptions

    def __init__(self, context: Context, options: NexusOptions) -> None:
        self._options = options
        profile = context.terms.phase_profile or ASSUMED
        self._model = PhaseModel(profile, saturates=options.saturation, contends=options.contention)
        self._prefill_frac = 0.5
        self.evaluations = 0  # of the last decision

    @property
    def switch_s(self) -> float:
        return self._options.switch_s

    def shares(
        self, lane: Lane, prefill: Batch | None, decode: Batch | None, view: ReplicaView, now_s: float
    ) -> Shares:
        if prefill is None or decode is None:
            return Shares(1.0, 1.0)
        if lane is Lane.PREFILL:
            used_frac = 1.0 - view.blocks_available / view.block_count
            found = self._search(prefill, decode, is_full=used_frac >= self._options.kv_switch_frac)
            if abs(found - self._prefill_frac) > self._options.dead_band_frac:
                self._prefill_frac = found
        return Shares(self._prefill_frac, 1.0 - self._prefill_frac)

    def _search(self, prefill: Batch, decode: Batch, is_full: bool) -> float:
        """The prefill share: the favoured lane's as large as the other's limit allows, by steps."""
        options, model = self._options, self._model
        bound, other = (prefill, decode) if is_full else (decode, prefill)
        slack = options.prefill_slack_frac if is_full else options.decode_slack_frac
        limit_s = (1.0 + slack) * model.seconds(bound, 1.0)
        self.evaluations = 1

        def holds(favoured: float) -> bool:
            self.evaluations += 1
            return model.seconds(bound, 1.0 - favoured, other) <= limit_s

        start = 1.0 - self._prefill_frac if is_full else self._prefill_frac
        favoured = start
        if holds(start):
            while self.evaluations < EVALUATIONS_MAX:
                more = _within(favoured + options.step_frac)
                if more == favoured or not holds(more):
                    break
                favoured = more
        else:
            while self.evaluations < EVALUATIONS_MAX:
                less = _within(favoured - options.step_frac)
                if less == favoured:
                    break
                favoured = less
                if holds(favoured):
                    break
        return 1.0 - favoured if is_full else favoured


def _within(share: float) -> float:
    """Rounded, so that a way up and down ends where it began."""
    return min(1.0 - FLOOR, max(FLOOR, round(share, 6)))
