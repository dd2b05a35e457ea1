"""A trace through the twin: the counterpart of `workloads/replay.py`, in virtual time.

Open loop: requests are dealt to the replicas in turn, and a replica is only advanced when something
reaches it, so that the cost of a request does not depend on the number of replicas. Where answers decide
what is sent next (sessions, or a cap on requests in flight), `closed_loop` serves instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from penstock.core.metrics import RequestOutcome
from penstock.core.settings import Settings
from penstock.core.step import Direction
from penstock.replica.limits import ReplicaLimits
from penstock.twin.closed_loop import ClosedLoop
from penstock.twin.costs.model import CostModel
from penstock.twin.laned import make_twin
from penstock.twin.replica import PathCosts, TwinReplica
from penstock.twin.requests import RequestMaker
from penstock.twin.sampling import fleet_series, points_each
from penstock.workloads.server_metrics import ServerSeries
from penstock.workloads.sessions import RecordedOrder, SessionLoop
from penstock.workloads.trace import TraceRow


@dataclass(frozen=True, slots=True)
class Clients:
    """How those who ask behave; the same words as the options of `penstock replay`."""

    closed_loop: bool = False  # a session's next turn waits for its answer and for think time
    rate_scale: float = 1.0  # what the rows' arrivals were divided by already, for think times
    concurrency_max: int | None = None  # most requests in flight; None: no cap
    asked_tokens: int | None = None  # `max_tokens` of every request; None: just what was recorded

    @property
    def is_open(self) -> bool:
        return not self.closed_loop and self.concurrency_max is None


def simulate(
    rows: Iterable[TraceRow],
    settings: Settings,
    limits: ReplicaLimits,
    cost: CostModel,
    on_outcome: Callable[[RequestOutcome], None],
    *,
    replicas: int = 1,
    path: PathCosts | None = None,
    clients: Clients | None = None,
) -> list[TwinReplica]:
    """Serve `rows` (in time order) on `replicas`; every request ends in one outcome. Returns the replicas.

    Deterministic, and independent of wall time. Outcomes come in order of finishing on each replica. A row
    that failed in the trace is not sent.
    """
    path, clients = path or PathCosts(), clients or Clients()
    points = points_each(replicas)
    if not clients.is_open:
        turns = SessionLoop(rows, clients.rate_scale) if clients.closed_loop else RecordedOrder(rows)
        maker = RequestMaker(limits.kv_block_tokens, clients.asked_tokens)
        loop = ClosedLoop(turns, maker, clients.concurrency_max, on_outcome)
        fleet = [make_twin(settings, limits, cost, path, loop.ended, points) for _ in range(replicas)]
        loop.serve(fleet)
        return fleet
    fleet = [make_twin(settings, limits, cost, path, on_outcome, points) for _ in range(replicas)]
    maker = RequestMaker(limits.kv_block_tokens, clients.asked_tokens)
    sent = (row for row in rows if not row.failed)
    for number, row in enumerate(sent):
        fleet[number % replicas].arrive(maker.make(number, row, row.arrival_s), row.output_tokens)
    for replica in fleet:
        replica.finish()
    return fleet


def series_of(fleet: list[TwinReplica]) -> ServerSeries:
    """Running, waiting and KV use of all replicas over virtual time, and the growth of their counters."""
    stats = [twin.replica.stats() for twin in fleet]
    counters = {
        "prefix_query_tokens": float(sum(each.prefix_query_tokens_total for each in stats)),
        "prefix_hit_tokens": float(sum(each.prefix_hit_tokens_total for each in stats)),
        "preemptions": float(sum(each.preemptions_total for each in stats)),
    }
    if any(twin.replica.limits.host_kv_blocks for twin in fleet):
        for way in Direction:
            counters[f"swap_{way}_bytes"] = float(sum(each.swap_bytes_total[way.value] for each in stats))
        counters["swap_stall_s"] = sum(each.swap_stall_s_total for each in stats)
    return fleet_series([twin.sampler.series for twin in fleet], counters)
