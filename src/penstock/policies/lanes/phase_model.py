"""Predicts the seconds of a lane's step from its batch, its share, and what the other lane computes."""

from __future__ import annotations

from penstock.core.phase_profile import PhaseProfile
from penstock.policies.estimate.step_time import chunk_pairs
from penstock.policies.lanes import Batch


class PhaseModel:
    """Pure. `saturates` and `contends` switch terms of the model off, to see what they are worth."""

    def __init__(self, profile: PhaseProfile, *, saturates: bool = True, contends: bool = True) -> None:
        self._profile = profile
        self._saturates = saturates
        self._contention = profile.contention if contends else 0.0

    def seconds(self, batch: Batch, share: float, other: Batch | None = None) -> float:
        """On `share` of the device; `other` has the rest, and draws bandwidth meanwhile."""
        stretch = 1.0
        if other is not None and self._contention:
            rest = max(1e-3, 1.0 - share)
            stretch += self._contention * self._drawn(other, rest)
        return self._time(batch, share, stretch)

    def _time(self, batch: Batch, share: float, stretch: float) -> float:
        profile = self._profile
        compute = 1.0 / self._speed(share, profile.compute_knee, profile.compute_slope)
        memory = stretch / self._speed(share, profile.memory_knee, profile.memory_slope)
        products_s = max(profile.row_s * batch.rows * compute, profile.weights_s * memory)
        fixed_s = profile.step_s + profile.sequence_s * (batch.decodes + len(batch.prefills))
        return fixed_s + products_s + self._attention(batch, compute, memory)

    def _attention(self, batch: Batch, compute: float, memory: float) -> float:
        profile = self._profile
        pairs = sum(chunk_pairs(new, context) for new, context in batch.prefills)
        return profile.pair_s * pairs * compute + profile.context_s * _read_tokens(batch) * memory

    def _drawn(self, batch: Batch, share: float) -> float:
        """The fraction of the bandwidth that the batch draws on its share, on average."""
        profile = self._profile
        memory_s = profile.weights_s + profile.context_s * _read_tokens(batch)
        return min(1.0, memory_s / self._time(batch, share, 1.0))

    def _speed(self, share: float, knee: float, slope: float) -> float:
        """Of the whole device's."""
        if not self._saturates or share >= 1.0:
            return min(1.0, share)
        whole = knee + slope * (1.0 - knee)
        return (share if share <= knee else knee + slope * (share - knee)) / whole


def _read_tokens(batch: Batch) -> int:
    """Tokens of KV that attention reads, those that the batch makes left out of prompts."""
    return batch.decode_context + sum(context - new for new, context in batch.prefills)
