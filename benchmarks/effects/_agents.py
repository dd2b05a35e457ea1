"""Agents through one replica of the twin: a closed loop in which tools take their recorded time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.effects.serving import NO_PATH, llama_8b
from penstock.core.metrics import RequestOutcome
from penstock.core.settings import Settings
from penstock.replica.limits import ReplicaLimits
from penstock.replica.messages import ReplicaStats
from penstock.twin.costs.model import CostModel
from penstock.twin.requests import number_of
from penstock.twin.simulate import Clients, simulate
from penstock.workloads.trace import TraceRow


@dataclass(frozen=True)
class AgentsServed:
    """Job times in seconds, by program; tokens of prompts that were computed once before."""

    job_s: dict[str, float]
    recomputed_tokens: int
    cached_frac: float  # of the tokens of returning turns that had been computed before
    stats: ReplicaStats
    outcomes: dict[int, RequestOutcome]  # by the row's place in the trace

    @property
    def mean_job_s(self) -> float:
        return float(np.mean(list(self.job_s.values())))

    @property
    def makespan_s(self) -> float:
        return max(outcome.finish_s for outcome in self.outcomes.values())


def serve_agents(
    rows: Sequence[TraceRow], settings: Settings, sizes: ReplicaLimits, cost: CostModel | None = None
) -> AgentsServed:
    """Every program to its end. A turn's tool time runs from its client's last token."""
    outcomes: dict[int, RequestOutcome] = {}

    def ended(outcome: RequestOutcome) -> None:
        outcomes[number_of(outcome.request_id)] = outcome

    fleet = simulate(
        iter(rows),
        settings,
        sizes,
        cost or llama_8b(),
        ended,
        path=NO_PATH,
        clients=Clients(closed_loop=True),
    )
    replica = fleet[0].replica
    replica.check_invariants()
    assert len(outcomes) == len(rows) and all(outcome.is_answered for outcome in outcomes.values())
    return _account(rows, outcomes, replica.stats())


def _account(
    rows: Sequence[TraceRow], outcomes: dict[int, RequestOutcome], stats: ReplicaStats
) -> AgentsServed:
    began_s: dict[str, float] = {}
    ended_s: dict[str, float] = {}
    known: dict[str, int] = {}  # tokens that had KV when the program's last turn ended
    known_sum = cached_sum = 0
    for number, row in enumerate(rows):
        name, outcome = row.session_id or f"alone-{number}", outcomes[number]
        began_s.setdefault(name, outcome.arrival_s)
        ended_s[name] = outcome.finish_s
        known_sum += known.get(name, 0)
        cached_sum += min(outcome.cached_tokens, known.get(name, 0))
        known[name] = row.prompt_tokens + row.output_tokens - 1
    return AgentsServed(
        {name: ended_s[name] - began_s[name] for name in began_s},
        known_sum - cached_sum + sum(stats.preempted_tokens_total.values()),
        cached_sum / max(1, known_sum),
        stats,
        outcomes,
    )
