"""A trace through the twin: the counterpart of `workloads/replay.py`, in virtual time.

Open loop: requests are dealt to the replicas in turn, and a replica is only advanced when something
reaches it, so that the cost of a request does not depend on the number of replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from penstock.core.metrics import RequestOutcome
from penstock.core.request import Request
from penstock.core.settings import Settings
from penstock.replica.limits import ReplicaLimits
from penstock.twin.costs.model import CostModel
from penstock.twin.replica import PathCosts, TwinReplica
from penstock.workloads.trace import TraceRow


def simulate(
    rows: Iterable[TraceRow],
    settings: Settings,
    limits: ReplicaLimits,
    cost: CostModel,
    on_outcome: Callable[[RequestOutcome], None],
    *,
    replicas: int = 1,
    path: PathCosts | None = None,
) -> list[TwinReplica]:
    """Serve `rows` (in time order) on `replicas`; every request ends in one outcome. Returns the replicas.

    Deterministic, and independent of wall time. Outcomes come in order of finishing on each replica.
    """
    path = path or PathCosts()
    fleet = [TwinReplica(settings, limits, cost, path, on_outcome) for _ in range(replicas)]
    for index, request in enumerate(requests_of(rows, limits.kv_block_tokens)):
        fleet[index % replicas].arrive(request)
    for replica in fleet:
        replica.finish()
    return fleet


def requests_of(rows: Iterable[TraceRow], block_tokens: int) -> Iterator[Request]:
    """What a replay of the rows would send: outputs of the recorded length, no failed rows."""
    for index, row in enumerate(rows):
        if row.failed:
            continue
        yield Request(
            id=f"r{index}",
            prompt_len=row.prompt_tokens,
            max_output_tokens=row.output_tokens,
            arrival_s=row.arrival_s,
            block_keys=_block_keys(row, block_tokens),
            tenant=row.tenant,
            slo_class=row.slo_class,
            session_id=row.session_id,
        )


def _block_keys(row: TraceRow, block_tokens: int) -> list[bytes] | None:
    """Keys of the prompt's full KV blocks, out of the trace's larger (or equal) content blocks."""
    if row.block_hashes is None or row.block_tokens % block_tokens:
        return None
    per_hash = row.block_tokens // block_tokens
    full_blocks = row.prompt_tokens // block_tokens
    keys = [
        content.to_bytes(8, "big", signed=True) + part.to_bytes(4, "big")
        for content in row.block_hashes
        for part in range(per_hash)
    ]
    return keys[:full_blocks]
