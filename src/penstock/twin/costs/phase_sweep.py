"""A short sweep of a device's operators over sizes and shares, fitted to a `PhaseProfile`."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from penstock.core.phase_profile import PhaseProfile
from penstock.policies.lanes import Batch
from penstock.policies.lanes.phase_model import PhaseModel
from penstock.twin.costs.model import CostModel
from penstock.twin.costs.shares import Divisible, ShareCurve, SharedDevice
from penstock.twin.costs.work import StepWork

SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ROWS: Final = 2048
_DECODES: Final = 32
_CONTEXT: Final = 1024
_KNEES: Final = tuple(round(0.2 + 0.05 * i, 2) for i in range(17))
_SLOPES: Final = tuple(round(0.1 * i, 1) for i in range(11))


def sweep(cost: CostModel) -> PhaseProfile | None:
    """None for a cost model that cannot be taken apart. Pure; some hundred questions."""
    if not isinstance(cost, Divisible):
        return None
    one = cost.sides(StepWork((), 1, 1, 1))
    many = cost.sides(StepWork((), _DECODES, _DECODES * _CONTEXT, _DECODES))
    prompt = cost.sides(StepWork([(_ROWS, _ROWS)], 0, 0, 1))
    later = cost.sides(StepWork([(_ROWS, 2 * _ROWS)], 0, 0, 1))
    arithmetic = [sum(compute for compute, _ in each.classes) for each in (prompt, later)]
    pair_s = (arithmetic[1] - arithmetic[0]) / (_ROWS * _ROWS)
    row_s = (arithmetic[0] - pair_s * _ROWS * (_ROWS + 1) / 2) / _ROWS
    context_s = (many.memory_s - one.memory_s) / (_DECODES * _CONTEXT)
    sequence_s = max(0.0, many.fixed_s - one.fixed_s) / (_DECODES - 1)
    device = SharedDevice(cost)
    compute = _fit_curve(device, StepWork([(_ROWS, _ROWS)], 0, 0, 1))
    memory = _fit_curve(device, StepWork((), 4, 4 * 16, 4))
    found = PhaseProfile(
        step_s=one.fixed_s - sequence_s,
        sequence_s=sequence_s,
        row_s=row_s,
        weights_s=one.memory_s,
        pair_s=pair_s,
        context_s=context_s,
        compute_knee=compute[0],
        compute_slope=compute[1],
        memory_knee=memory[0],
        memory_slope=memory[1],
        contention=1.0,
        error_frac=0.0,
        source="a sweep of the twin's cost model",
    )
    errors = [abs(predicted / seconds - 1.0) for predicted, seconds in points(cost, found)]
    return replace(found, error_frac=float(np.median(errors)))


def points(cost: CostModel, profile: PhaseProfile) -> list[tuple[float, float]]:
    """(predicted, charged) seconds of batches that the fit has not seen, alone and in company."""
    device, model = SharedDevice(cost), PhaseModel(profile)
    prompts = [Batch(((new, new + before),)) for new in (256, 768, 1536, 4096) for before in (0, 3000)]
    decodes = [Batch((), n, n * context) for n in (2, 12, 48, 96) for context in (300, 2500)]
    found = []
    for share in (0.25, 0.45, 0.65, 0.85):
        for index, batch in enumerate([*prompts, *decodes]):
            other = decodes[index % 8] if batch.prefills else prompts[index % 8]
            load, company = (
                device.load(work_of(each), s) for each, s in ((batch, share), (other, 1 - share))
            )
            found.append((model.seconds(batch, share), device.seconds(load)))
            found.append((model.seconds(batch, share, other), device.seconds(load, company)))
    return found


def work_of(batch: Batch) -> StepWork:
    """The cost model's question for one lane's step; prompts are taken to end with it."""
    return StepWork(batch.prefills, batch.decodes, batch.decode_context, batch.decodes or len(batch.prefills))


def _fit_curve(device: SharedDevice, work: StepWork) -> tuple[float, float]:
    """Knee and slope that explain how the seconds of this work change with the share, by search."""
    fixed_s = device.load(work, 1.0).sides.fixed_s
    whole_s = device.seconds(device.load(work, 1.0)) - fixed_s
    measured = [(device.seconds(device.load(work, share)) - fixed_s) / whole_s for share in SHARES]

    def misfit(curve: ShareCurve) -> float:
        pairs = zip(SHARES, measured, strict=True)
        return sum((1.0 / (curve.speed(share) * value) - 1.0) ** 2 for share, value in pairs)

    best = min((ShareCurve(knee, slope) for knee in _KNEES for slope in _SLOPES), key=misfit)
    return best.saturation, best.slope
