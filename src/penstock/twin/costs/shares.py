"""What a step costs on a share of the device, and beside a step of the other lane.

A step is taken apart into classes of operators, each with the seconds that its arithmetic alone and its
memory traffic alone would take on the whole device. On a share s, with memory stretched by contention c,

    seconds(s, c) = seconds · f(s, c) / f(1, 1),   f(s, c) = fixed + Σ max(compute / v(s), c · memory / b(s))

v and b rise linearly up to a saturation share and with a smaller slope from there (card nexus): few of the
compute units draw most of the memory's bandwidth, so a decode step loses little on half of the device, while
matrix products of a prompt lose nearly half of their speed. The other lane draws u of the bandwidth while it
runs; whoever reads memory meanwhile waits in proportion, c = 1 + κ · u.

The GPU's curves are assumptions. The whole device without company costs exactly what the model says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from penstock.twin.costs.model import CostModel
from penstock.twin.costs.work import StepWork


@dataclass(frozen=True, slots=True)
class Sides:
    """Seconds on the whole device. `classes` pairs arithmetic and memory traffic of operators alike."""

    classes: tuple[tuple[float, float], ...]
    fixed_s: float = 0.0  # launches and host code: no share changes them

    @property
    def memory_s(self) -> float:
        return sum(memory for _, memory in self.classes)


@dataclass(frozen=True, slots=True)
class ShareCurve:
    """Speed on a share: linear up to `saturation`, `slope` of that from there on; 1 on the whole device."""

    saturation: float
    slope: float

    def speed(self, share: float) -> float:
        """Of the whole device's. Pure."""
        knee, slope = self.saturation, self.slope
        whole = knee + slope * (1.0 - knee)
        return (share if share <= knee else knee + slope * (share - knee)) / whole


@dataclass(frozen=True, slots=True)
class ShareCurves:
    """Of one device. `contention` is κ: 1 where memory is shared in proportion to demand."""

    compute: ShareCurve
    memory: ShareCurve
    contention: float
    source: str


# No measurement of ours: green contexts or MPS need a GPU. Large matrix products scale with the units up to
# the power limit; reading memory saturates with some 40 % of them. Both shapes are those of the papers.
GPU: Final = ShareCurves(
    ShareCurve(0.9, 0.5),
    ShareCurve(0.4, 0.1),
    1.0,
    "assumed; shapes after semi-PD (arXiv 2504.19867) and Nexus (arXiv 2507.06608)",
)
# One thread against two of this project's engine: a chunk of 512 rows gains 1.44 times, a decode step of few
# rows, which reads weights, nothing. Below one core a duty cycle is taken to be linear.
CPU: Final = ShareCurves(
    ShareCurve(0.5, 0.45), ShareCurve(0.5, 0.0), 1.0, "benchmarks/RESULTS.md, section threads: two cores"
)
FEW_UNITS: Final = 16


@runtime_checkable
class Divisible(Protocol):
    """A cost model that knows what its steps are made of."""

    @property
    def share_curves(self) -> ShareCurves: ...
    def sides(self, work: StepWork) -> Sides: ...


@dataclass(slots=True)
class Load:
    """A step that runs: what it computes, taken apart, and its share of the device."""

    seconds: float  # alone on the whole device
    sides: Sides
    share: float


class SharedDevice:
    """Seconds of steps that share a device. Pure. A model that cannot be taken apart counts as arithmetic."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._parts = cost if isinstance(cost, Divisible) else None
        self.curves = GPU if self._parts is None else self._parts.share_curves

    def load(self, work: StepWork, share: float) -> Load:
        seconds = self._cost.seconds(work)
        sides = Sides(((seconds, 0.0),)) if self._parts is None else self._parts.sides(work)
        return Load(seconds, sides, share)

    def seconds(self, load: Load, other: Load | None = None) -> float:
        """Of the whole step, if `other` runs all along. Shares beyond the device are cut in proportion."""
        share = load.share
        if other is None:
            return load.seconds if share >= 1.0 else self._scaled(load, share, 1.0)
        excess = max(1.0, share + other.share)
        drawn = self.bandwidth_drawn(other, other.share / excess)
        return self._scaled(load, share / excess, 1.0 + self.curves.contention * drawn)

    def bandwidth_drawn(self, load: Load, share: float) -> float:
        """The fraction of the memory's bandwidth that the step draws on its share, on average."""
        seconds = _time(load.sides, self.curves, share, 1.0)
        return min(1.0, load.sides.memory_s / seconds) if seconds > 0.0 else 0.0

    def _scaled(self, load: Load, share: float, stretch: float) -> float:
        whole = _time(load.sides, self.curves, 1.0, 1.0)
        if whole <= 0.0:
            return load.seconds
        return load.seconds * (_time(load.sides, self.curves, share, stretch) / whole)


def _time(sides: Sides, curves: ShareCurves, share: float, stretch: float) -> float:
    compute_scale = 1.0 / curves.compute.speed(share)
    memory_scale = stretch / curves.memory.speed(share)
    total = sides.fixed_s
    for compute, memory in sides.classes:
        compute_s, memory_s = compute * compute_scale, memory * memory_scale
        total += compute_s if compute_s > memory_s else memory_s
    return total
