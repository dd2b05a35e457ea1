"""A file of requests on an engine of one's own: nothing else runs, so the whole job is in flight at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from penstock.core.settings import Settings
from penstock.desk.job_plan import JobPlan
from penstock.gateway.batches.job import Job
from penstock.gateway.batches.lines import JobFile, JobLine, LineResult
from penstock.gateway.state import Gateway

IN_FLIGHT_MIN: Final = 1024  # the engine's rank sees so far ahead; more only costs memory
TENANT: Final = "default"


def offline_settings(settings: Settings) -> Settings:
    """No bound at the door but the job's own, and no folder of a server."""
    desk = replace(
        settings.desk,
        queue_requests_max=1 << 20,
        queue_tokens_max=1 << 50,
        queue_wait_s_max=1e12,
        tenant_requests_max=0,
    )
    return replace(settings, desk=desk, batch=replace(settings.batch, folder=""))


async def run_offline(
    gateway: Gateway, file: JobFile, results: list[LineResult], on_progress: Callable[[int], None]
) -> tuple[JobPlan, float]:
    """Run every line; `results` fills up as they end, in no order. Returns the plan and the seconds."""

    def take(result: LineResult) -> None:
        results.append(result)
        on_progress(len(results))

    gateway.switchboard.start()
    job = Job(
        gateway,
        file,
        file.lines,
        name="job",
        tenant=TENANT,
        in_flight_max=max(IN_FLIGHT_MIN, 2 * gateway.info.running_max),
        is_background=False,
        on_result=take,
    )
    try:
        plan = await job.prepare()
        began_s = time.perf_counter()
        await job.run()
        return plan, time.perf_counter() - began_s
    finally:
        await gateway.switchboard.stop()
        gateway.pool.close()


def in_input_order(lines: Sequence[JobLine], results: Sequence[LineResult]) -> list[LineResult]:
    """As the lines stand in the file; lines without a result are left out."""
    by_number = {result.line.number: result for result in results}
    return [by_number[line.number] for line in lines if line.number in by_number]
