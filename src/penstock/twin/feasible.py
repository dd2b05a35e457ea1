"""What no waiting can mend: an SLO that one request alone misses, and requests that can never fit.

Asked before a simulation, so that the answer is a sentence and not a long run of misses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from penstock.core.errors import RequestError, SloInfeasible, TraceError
from penstock.core.metrics import RequestOutcome, Slo
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.replica.limits import ReplicaLimits, check_feasible
from penstock.twin.build import Machine
from penstock.twin.laned import make_twin
from penstock.twin.requests import RequestMaker
from penstock.workloads import wording
from penstock.workloads.trace import TraceRow


@dataclass(slots=True)
class Easiest:
    """The rows of a class that are the easiest in some way; filled while the rows pass."""

    shortest_prompt: TraceRow
    shortest_output: TraceRow  # of at least two tokens where there is one: it has a TPOT
    least_work: TraceRow

    @classmethod
    def of(cls, row: TraceRow) -> Easiest:
        return cls(row, row, row)

    def look_at(self, row: TraceRow) -> None:
        if row.prompt_tokens < self.shortest_prompt.prompt_tokens:
            self.shortest_prompt = row
        if _output_rank(row) < _output_rank(self.shortest_output):
            self.shortest_output = row
        if _work(row) < _work(self.least_work):
            self.least_work = row

    def rows(self) -> tuple[TraceRow, ...]:
        return (self.shortest_prompt, self.shortest_output, self.least_work)


def _output_rank(row: TraceRow) -> tuple[bool, int]:
    return (row.output_tokens < 2, row.prompt_tokens + row.output_tokens)


def _work(row: TraceRow) -> int:
    return row.prompt_tokens + 16 * row.output_tokens  # decoding a token costs as much as prefilling several


@dataclass(slots=True)
class TraceFacts:
    """What must be known of a trace before it is simulated."""

    rows: int = 0  # those that are sent
    failed: int = 0
    never_fit: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    never_fit_reason: str = ""

    @property
    def rate_rps(self) -> float | None:
        """Arrivals per second; None where they span no time."""
        span_s = self.last_s - self.first_s
        return (self.rows - 1) / span_s if span_s > 0 else None


@dataclass(frozen=True, slots=True)
class Infeasible:
    """One target that even the easiest request, alone on the machine, misses."""

    slo_class: str
    target: str  # `ttft`, `tpot` or `e2e`
    limit_ms: float
    best_ms: float

    def __str__(self) -> str:
        best, limit = wording.milliseconds(self.best_ms), wording.milliseconds(self.limit_ms)
        return (
            f"no request of class `{self.slo_class}` can meet {self.target.upper()} ≤ {limit} here: "
            f"the easiest one, alone on the machine, takes {best}"
        )


def look_at(rows: Iterable[TraceRow], limits: ReplicaLimits) -> tuple[TraceFacts, dict[str, Easiest]]:
    """One pass over the rows. Raises TraceError when nothing is left that could be served."""
    found, easiest = TraceFacts(), dict[str, Easiest]()
    for row in rows:
        if row.failed:
            found.failed += 1
            continue
        found.first_s = row.arrival_s if not found.rows else found.first_s
        found.last_s = row.arrival_s
        found.rows += 1
        if not _fits(row, limits):
            found.never_fit += 1
            found.never_fit_reason = found.never_fit_reason or _why_not(row, limits)
            continue
        known = easiest.get(row.slo_class)
        if known is None:
            easiest[row.slo_class] = Easiest.of(row)
        else:
            known.look_at(row)
    if not found.rows:
        raise TraceError(
            f"the trace has nothing to send: all of its {found.failed} rows failed.",
            hint="choose another `--window`; `penstock trace describe` counts the failed rows",
        )
    if found.never_fit == found.rows:
        raise TraceError(
            f"none of the trace's {found.rows} requests can ever run. The first: {found.never_fit_reason}",
            hint="make them smaller with `--length-divisor` or `--max-prompt-tokens`",
        )
    return found, easiest


def _fits(row: TraceRow, limits: ReplicaLimits) -> bool:
    """What `check_feasible` says, without making a request: a trace may have millions of rows."""
    tokens = row.prompt_tokens + row.output_tokens
    kv_tokens = limits.kv_blocks * limits.kv_block_tokens
    return tokens <= limits.context_len_max and tokens - 1 <= kv_tokens


def _why_not(row: TraceRow, limits: ReplicaLimits) -> str:
    try:
        check_feasible(Request("", row.prompt_tokens, row.output_tokens, 0.0), limits)
    except RequestError as error:
        return error.message
    raise AssertionError("`_fits` and `check_feasible` agree")


def infeasible_targets(
    easiest: dict[str, Easiest],
    slos: dict[str, Slo],
    settings: Settings,
    limits: ReplicaLimits,
    machine: Machine,
) -> list[Infeasible]:
    """Targets that the easiest request of their class misses when it has the machine to itself.

    Alone means without a queue and without reuse; a prefix that is cached already could still be faster.
    """
    found = []
    for name, candidates in sorted(easiest.items()):
        slo = slos.get(name, Slo())
        alone = [_alone(row, settings, limits, machine) for row in candidates.rows()]
        measured: dict[str, tuple[float | None, Sequence[float | None]]] = {
            "ttft": (slo.ttft_ms, [outcome.ttft_s for outcome in alone]),
            "tpot": (slo.tpot_ms, [outcome.tpot_s for outcome in alone]),
            "e2e": (slo.e2e_ms, [outcome.e2e_s for outcome in alone]),
        }
        for target, (limit_ms, values_s) in measured.items():
            known_ms = [value * 1e3 for value in values_s if value is not None]
            if limit_ms is not None and len(known_ms) == len(alone) and min(known_ms) > limit_ms:
                found.append(Infeasible(name, target, limit_ms, min(known_ms)))
    return found


def refuse_where_hopeless(found: Sequence[Infeasible], classes: Iterable[str]) -> None:
    """Raise SloInfeasible when no class has a chance to meet its SLO."""
    if {each.slo_class for each in found} >= set(classes):
        first = found[0]
        raise SloInfeasible(
            f"{first}.",
            hint=f"relax `--slo-{first.target}-ms` (0 turns it off), or choose faster hardware",
        )


def _alone(row: TraceRow, settings: Settings, limits: ReplicaLimits, machine: Machine) -> RequestOutcome:
    outcomes: list[RequestOutcome] = []
    twin = make_twin(settings, limits, machine.cost, machine.path, outcomes.append)
    plain = replace(row, session_id=None, block_hashes=None)
    twin.arrive(RequestMaker(limits.kv_block_tokens).make(0, plain, 0.0))
    twin.finish()
    return outcomes[0]
