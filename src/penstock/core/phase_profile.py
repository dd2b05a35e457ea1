"""How long a step of prompts or of decodes takes on a share of a device: what a sweep of it has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PhaseProfile:
    """Seconds on the whole device by what they are spent on, and how they change with the share (card nexus).

    A step takes `step_s`, and `sequence_s` a sequence, whatever its share. Its matrix products take the
    longer of `row_s` a row (arithmetic) and `weights_s` (reading the weights); attention takes `pair_s` a
    (query, key) pair of prompts and `context_s` a token of KV that is read. Arithmetic speeds up linearly to
    the share `compute_knee`, and with `compute_slope` of that from there on; memory likewise. `contention` is
    what a lane loses to the bandwidth that the other draws: 1 in proportion, 0 nothing.
    """

    step_s: float
    sequence_s: float
    row_s: float
    weights_s: float
    pair_s: float
    context_s: float
    compute_knee: float
    compute_slope: float
    memory_knee: float
    memory_slope: float
    contention: float
    error_frac: float  # median of the sweep's points
    source: str
