"""The calibrated cost model: whole steps, fitted to recorded steps of one engine on one machine.

    t = step_s + rows(N) + sample_s · samples + sequence_s · sequences
        + context_s · Σ contexts of decodes + pair_s · Σ (query, key) pairs of chunks + before_s · Σ before

N is the step's rows; `rows` is a monotone piecewise-linear function, because real kernels change with the
number of rows (threads join in, another kernel takes over) and no straight line follows that. Contexts
count the tokens after the step, `before` the tokens in front of a chunk, whose KV it reads. Every
coefficient is at least 0, so more work never costs less.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from penstock.core.errors import ConfigError
from penstock.twin.costs.hardware import PowerCurve, parse_error, parse_power
from penstock.twin.costs.least_squares import Array, mean_nonnegative, robust_nonnegative
from penstock.twin.costs.model import Seconds, decode_ramp
from penstock.twin.costs.operators import FitError, causal_pairs
from penstock.twin.costs.profile_file import SCHEMA_VERSION, Section, read_profile, toml_text
from penstock.twin.costs.shares import CPU, ShareCurves, Sides
from penstock.twin.costs.work import Bound, StepCost, StepWork

ROW_KNOTS: Final = (
    1,
    2,
    4,
    6,
    8,
    11,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    2048,
    4096,
)
SAMPLES_MIN: Final = 16
SAMPLES_MAX: Final = 1 << 20
MEMO_ROWS_MAX: Final = 1 << 17
KIND: Final = "steps"

Sample = tuple[StepWork, float]


@dataclass(frozen=True, slots=True)
class StepTerms:
    """Seconds per unit of each linear term; names as in the module's formula."""

    step_s: float
    sample_s: float
    sequence_s: float
    context_s: float
    pair_s: float
    before_s: float


@dataclass(frozen=True, slots=True)
class StepRange:
    """The largest values seen while fitting; beyond them a prediction is flagged."""

    rows: int
    decodes: int
    context: int
    samples: int


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Everything that is saved. `rows_s[i]` is the cost of `knots[i]` rows; knots ascend.

    `errors` are by regime: decode, prefill, mixed, all. `power` is idle 0 W and limit 0 W when unknown.
    """

    name: str
    terms: StepTerms
    knots: tuple[int, ...]
    rows_s: tuple[float, ...]
    range: StepRange
    errors: dict[str, FitError]
    power: PowerCurve
    source: str


class FittedCostModel:
    """A `CostModel` from a `StepProfile`. Deterministic; its memo only saves time."""

    def __init__(self, profile: StepProfile) -> None:
        assert len(profile.knots) == len(profile.rows_s) >= 2
        self.profile = profile
        self._terms = profile.terms
        self._memo: dict[int, float] = {0: 0.0}

    @property
    def relative_error(self) -> float:
        """The median error over all steps that were held back from the fit."""
        return self.profile.errors["all"].median

    def seconds(self, work: StepWork) -> float:
        terms, rows = self._terms, work.decodes
        attention_s = terms.context_s * work.decode_context
        for new, context in work.prefills:
            rows += new
            attention_s += terms.pair_s * (new * context - 0.5 * new * (new - 1)) + terms.before_s * (
                context - new
            )
        return self._fixed_s(rows, work.samples, work.decodes + len(work.prefills)) + attention_s

    def decode_seconds(self, decodes: int, decode_context: int, steps: int) -> Seconds:
        fixed_s = self._fixed_s(decodes, decodes, decodes)
        return decode_ramp(fixed_s, self._terms.context_s, decodes, decode_context, steps)

    def step(self, work: StepWork) -> StepCost:
        """Flops and bytes are unknown to a fit of whole steps and reported as 0."""
        seconds = self.seconds(work)
        shares = self._shares(work)
        bound = max(shares, key=lambda name: shares[name])
        is_compute = bound == "compute"
        watts = self.profile.power.watts(1.0 if is_compute else 0.0, 0.0 if is_compute else 1.0)
        return StepCost(seconds, bound, watts * seconds, 0.0, 0.0, self._in_range(work))

    @property
    def share_curves(self) -> ShareCurves:
        return CPU

    def sides(self, work: StepWork) -> Sides:
        """A step of one row is bound by the weights; what more rows cost is arithmetic."""
        terms, rows = self._terms, work.rows
        first_s = terms.step_s + self._rows_s(1)
        pairs = sum(causal_pairs(new, context) for new, context in work.prefills)
        before = sum(context - new for new, context in work.prefills)
        compute_s = max(0.0, self._rows_s(rows) - self._rows_s(1)) + terms.pair_s * pairs
        memory_s = first_s + terms.context_s * work.decode_context + terms.before_s * before
        host_s = terms.sample_s * work.samples + terms.sequence_s * (work.decodes + len(work.prefills))
        return Sides(((compute_s, 0.0), (0.0, memory_s)), host_s)

    def _shares(self, work: StepWork) -> dict[Bound, float]:
        """Seconds by bound. A step of one row reads all weights, so `step_s` counts as memory."""
        terms = self._terms
        pairs = sum(causal_pairs(new, context) for new, context in work.prefills)
        return {
            "memory": terms.step_s + terms.context_s * work.decode_context,
            "compute": self._rows_s(work.rows) + terms.pair_s * pairs,
            "overhead": terms.sample_s * work.samples
            + terms.sequence_s * (work.decodes + len(work.prefills)),
        }

    def _fixed_s(self, rows: int, samples: int, sequences: int) -> float:
        terms = self._terms
        fixed_s = terms.step_s + self._rows_s(rows)
        return fixed_s + (terms.sample_s * samples + terms.sequence_s * sequences)

    def _rows_s(self, rows: int) -> float:
        cost_s = self._memo.get(rows)
        if cost_s is None:
            cost_s = _interpolate(self.profile.knots, self.profile.rows_s, rows)
            if rows <= MEMO_ROWS_MAX:
                self._memo[rows] = cost_s
        return cost_s

    def _in_range(self, work: StepWork) -> bool:
        seen = self.profile.range
        longest = max((context for _, context in work.prefills), default=0)
        if work.decodes:
            longest = max(longest, work.decode_context // work.decodes)
        return (
            work.rows <= seen.rows
            and work.decodes <= seen.decodes
            and longest <= seen.context
            and work.samples <= seen.samples
        )

    def save(self, path: Path) -> None:
        """Write the profile; `load_fitted` reads it back to an equal model."""
        path.write_text(
            toml_text(_as_values(self.profile), "Recorded steps, fitted by `penstock calibrate`.")
        )


def _interpolate(knots: Sequence[int], costs_s: Sequence[float], rows: int) -> float:
    """Piecewise linear; beyond the last knot the last slope goes on, below the first its cost holds."""
    if rows <= knots[0]:
        return costs_s[0]
    right = min(bisect_right(knots, rows), len(knots) - 1)
    left = right - 1
    slope_s = (costs_s[right] - costs_s[left]) / (knots[right] - knots[left])
    return costs_s[left] + slope_s * (rows - knots[left])


def fit_steps(
    samples: Sequence[Sample],
    *,
    name: str = "this machine",
    source: str = "recorded steps",
    power: PowerCurve | None = None,
    is_lived: bool = False,
) -> FittedCostModel:
    """Fit a model to steps, with no negative coefficient.

    Steps made for the purpose are fitted robustly: what disturbed one of them is not the engine's. Of steps
    that were lived through (`is_lived`), behind a gateway and its clients, disturbances are part, and the
    fit is right on average. Errors are measured honestly: each half of the samples is predicted from a fit to
    the other half.
    Raises ConfigError for too few samples, seconds that are not positive and finite, or empty steps.
    """
    _check_samples(samples)
    knots = _knots(samples)
    values = _solve(samples, knots, is_lived)
    terms, rows_s = _unpack(values, knots)
    profile = StepProfile(
        name=name,
        terms=terms,
        knots=knots,
        rows_s=rows_s,
        range=_range(samples),
        errors=_cross_errors(samples, knots, is_lived),
        power=power or PowerCurve(0.0, 0.0, 0.35, 2.5, "assumed"),
        source=source,
    )
    return FittedCostModel(profile)


def _check_samples(samples: Sequence[Sample]) -> None:
    hint = "Record more steps, of different batch sizes and contexts."
    if not SAMPLES_MIN <= len(samples) <= SAMPLES_MAX:
        message = f"{len(samples)} recorded steps, but a fit needs {SAMPLES_MIN} to {SAMPLES_MAX}."
        raise ConfigError(message, hint=hint, param="samples")
    for index, (work, seconds) in enumerate(samples):
        if not 0.0 < seconds < float("inf"):
            message = f"Recorded step {index} took {seconds} s, which is not a positive time."
            raise ConfigError(message, hint="Drop the step from the record.", param="seconds")
        if work.rows <= 0:
            message = f"Recorded step {index} has no rows."
            raise ConfigError(message, hint="Drop the step from the record.", param="rows")


def _knots(samples: Sequence[Sample]) -> tuple[int, ...]:
    """The knots up to the largest step, which is itself the last: no segment is without data at its end."""
    largest = max(2, *(work.rows for work, _ in samples))
    return (*(knot for knot in ROW_KNOTS if knot < largest), largest)


def _features(work: StepWork, knots: Sequence[int]) -> list[float]:
    """One row of the design matrix: the linear terms, then the filled share of every row segment."""
    prefills = work.prefills
    rows = work.rows
    linear = [
        1.0,
        float(work.samples),
        float(work.decodes + len(prefills)),
        float(work.decode_context),
        sum(causal_pairs(new, context) for new, context in prefills),
        float(sum(context - new for new, context in prefills)),
    ]
    segments = [min(1.0, max(0.0, (rows - low) / (high - low))) for low, high in pairwise(knots)]
    return linear + segments


def _solve(samples: Sequence[Sample], knots: Sequence[int], is_lived: bool) -> Array:
    matrix = np.array([_features(work, knots) for work, _ in samples])
    seconds = np.array([seconds for _, seconds in samples])
    return mean_nonnegative(matrix, seconds) if is_lived else robust_nonnegative(matrix, seconds)


def _unpack(values: Array, knots: Sequence[int]) -> tuple[StepTerms, tuple[float, ...]]:
    """Coefficients of the terms, and the row costs at the knots.

    One row costs nothing by itself: its cost cannot be told from that of the step, and is in `step_s`.
    """
    step_s, sample_s, sequence_s, context_s, pair_s, before_s = (float(value) for value in values[:6])
    rows_s = np.concatenate([[0.0], np.cumsum(values[6:])])
    assert len(rows_s) == len(knots)
    terms = StepTerms(step_s, sample_s, sequence_s, context_s, pair_s, before_s)
    return terms, tuple(float(value) for value in rows_s)


def _range(samples: Sequence[Sample]) -> StepRange:
    works = [work for work, _ in samples]
    contexts = [context for work in works for _, context in work.prefills]
    contexts += [work.decode_context // work.decodes for work in works if work.decodes]
    return StepRange(
        rows=max(work.rows for work in works),
        decodes=max(work.decodes for work in works),
        context=max(contexts),
        samples=max(work.samples for work in works),
    )


def regime(work: StepWork) -> str:
    """`decode`, `prefill` or `mixed`."""
    if not work.prefills:
        return "decode"
    return "mixed" if work.decodes else "prefill"


def _cross_errors(samples: Sequence[Sample], knots: Sequence[int], is_lived: bool) -> dict[str, FitError]:
    """Relative errors of each half under a fit to the other. Halves interleave in order of size."""
    ordered = sorted(samples, key=lambda sample: (sample[0].rows, sample[0].decode_context, sample[1]))
    halves = (ordered[0::2], ordered[1::2])
    found: dict[str, list[float]] = {"all": []}
    for fitted, held in (halves, halves[::-1]):
        values = _solve(fitted, knots, is_lived)
        for work, seconds in held:
            error = abs(float(np.dot(values, _features(work, knots))) / seconds - 1.0)
            found["all"].append(error)
            found.setdefault(regime(work), []).append(error)
    return {name: _fit_error(errors) for name, errors in sorted(found.items())}


def _fit_error(errors: list[float]) -> FitError:
    median, p90 = np.quantile(errors, [0.5, 0.9])
    return FitError(float(median), float(p90), len(errors))


def _as_values(profile: StepProfile) -> Mapping[str, Any]:
    terms, seen, power = profile.terms, profile.range, profile.power
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "name": profile.name,
        "source": profile.source,
        "terms": {field: getattr(terms, field) for field in StepTerms.__dataclass_fields__},
        "rows": {"knots": list(profile.knots), "seconds": list(profile.rows_s)},
        "range": {field: getattr(seen, field) for field in StepRange.__dataclass_fields__},
        "power": {field: getattr(power, field) for field in PowerCurve.__dataclass_fields__},
        "errors": {
            name: {"median_error_frac": error.median, "p90_error_frac": error.p90, "points": error.points}
            for name, error in profile.errors.items()
        },
    }


def load_fitted(path: Path) -> FittedCostModel:
    """Raises ConfigError naming the field that is missing, negative, NaN or out of order."""
    return FittedCostModel(parse_fitted(read_profile(path, KIND)))


def parse_fitted(root: Section) -> StepProfile:
    """Raises ConfigError naming the field. Pure."""
    terms, seen = root.section("terms"), root.section("range")
    knots, rows_s = _parse_rows(root.section("rows"))
    errors = {name: parse_error(section) for name, section in root.sections("errors").items()}
    if "all" not in errors:
        root.section("errors").refuse("all", "is missing")
    profile = StepProfile(
        name=root.text("name"),
        terms=StepTerms(**{field: terms.number(field) for field in StepTerms.__dataclass_fields__}),
        knots=knots,
        rows_s=rows_s,
        range=StepRange(
            **{field: seen.integer(field, 0, 1 << 40) for field in StepRange.__dataclass_fields__}
        ),
        errors=errors,
        power=parse_power(root.section("power")),
        source=root.text("source"),
    )
    for section in (root, terms, seen):
        section.done()
    return profile


def _parse_rows(section: Section) -> tuple[tuple[int, ...], tuple[float, ...]]:
    knots, rows_s = section.numbers("knots"), section.numbers("seconds")
    section.done()
    if len(knots) < 2 or any(not knot.is_integer() for knot in knots):
        section.refuse("knots", "must be at least two whole numbers")
    if any(low >= high for low, high in pairwise(knots)):
        section.refuse("knots", "must ascend")
    if len(rows_s) != len(knots):
        section.refuse("seconds", f"has {len(rows_s)} values for {len(knots)} knots")
    if any(low > high for low, high in pairwise(rows_s)):
        section.refuse("seconds", "must not descend: more rows never cost less")
    return tuple(int(knot) for knot in knots), tuple(rows_s)
