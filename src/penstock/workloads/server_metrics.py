"""The server's own view during a replay: running, waiting and KV use, read once a second from `/metrics`.

Names of Penstock, vLLM, SGLang and llama.cpp are known. Memory is bounded: when the series is full, every
other point is dropped and only every second sample is kept from then on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx

from penstock.workloads.target import fetch

SAMPLE_EVERY_S = 1.0
SAMPLE_TIMEOUT_S = 5.0
POINTS_MAX = 4096
FAILURES_MAX = 5  # in a row; then the sampler gives up
LINES_MAX = 200_000

_RUNNING = (
    "penstock:num_requests_running",
    "vllm:num_requests_running",
    "sglang:num_running_reqs",
    "llamacpp:requests_processing",
)
_WAITING = (
    "penstock:num_requests_waiting",
    "vllm:num_requests_waiting",
    "sglang:num_queue_reqs",
    "llamacpp:requests_deferred",
)
_KV_FRACTION = (
    "penstock:kv_cache_usage_perc",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
)
_COUNTERS = {
    "prefix_query_tokens": ("penstock:prefix_cache_queries_total", "vllm:prefix_cache_queries_total"),
    "prefix_hit_tokens": ("penstock:prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
    "preemptions": ("penstock:num_preemptions_total", "vllm:num_preemptions_total"),
}


@dataclass(slots=True)
class ServerSeries:
    """Samples on the run's clock, None where the server does not say; counters are growth over the run."""

    t_s: list[float] = field(default_factory=list)
    running: list[float | None] = field(default_factory=list)
    waiting: list[float | None] = field(default_factory=list)
    kv_usage_frac: list[float | None] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    def append(self, t_s: float, running: float | None, waiting: float | None, kv_frac: float | None) -> None:
        self.t_s.append(t_s)
        self.running.append(running)
        self.waiting.append(waiting)
        self.kv_usage_frac.append(kv_frac)

    def halve(self) -> None:
        """Keep every second point."""
        for values in (self.t_s, self.running, self.waiting, self.kv_usage_frac):
            del values[1::2]


def parse_metrics(text: str) -> dict[str, list[float]]:
    """Values of each metric over its label sets, from Prometheus text; other lines are skipped."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines()[:LINES_MAX]:
        if not line or line[0] == "#":
            continue
        name, _, rest = line.partition("{")
        if rest:
            value_text = rest.rpartition("}")[2]
        else:
            name, _, value_text = line.partition(" ")
        try:
            value = float(value_text.split()[0])
        except (ValueError, IndexError):
            continue
        if math.isfinite(value):
            found.setdefault(name.strip(), []).append(value)
    return found


class MetricsSampler:
    """Fills a `ServerSeries` until cancelled, or until the server failed to answer five times in a row."""

    def __init__(self, client: httpx.AsyncClient, base_url: str, clock: Callable[[], float]) -> None:
        self._client = client
        self._url = base_url + "/metrics"
        self._clock = clock
        self._first: dict[str, float] | None = None
        self.series = ServerSeries()

    async def run(self) -> None:
        """Sample every second. Ends by itself only when there is nothing to read."""
        failures = 0
        stride = 1
        tick = 0
        while failures < FAILURES_MAX:
            if tick % stride == 0:
                failures = 0 if await self.sample() else failures + 1
            if len(self.series.t_s) >= POINTS_MAX:
                self.series.halve()
                stride *= 2
            tick += 1
            await asyncio.sleep(SAMPLE_EVERY_S - self._clock() % SAMPLE_EVERY_S)

    async def sample(self) -> bool:
        """Take one sample; False when the server gave none."""
        at_s = self._clock()
        try:
            status, body = await fetch(self._client, "GET", self._url, timeout_s=SAMPLE_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        if status != 200:
            return False
        found = parse_metrics(body.decode("utf-8", "replace"))
        kv = _first_known(found, _KV_FRACTION)
        running, waiting = _sum(_first_known(found, _RUNNING)), _sum(_first_known(found, _WAITING))
        if running is None and waiting is None and kv is None:
            return False
        self.series.append(at_s, running, waiting, sum(kv) / len(kv) if kv else None)
        self._count(found)
        return True

    def _count(self, found: Mapping[str, list[float]]) -> None:
        values = {name: _sum(_first_known(found, names)) for name, names in _COUNTERS.items()}
        now = {name: value for name, value in values.items() if value is not None}
        if self._first is None:
            self._first = now
        # A counter that went back belongs to a server that restarted: it then counts from 0.
        self.series.counters = {
            name: value - self._first.get(name, 0.0) if value >= self._first.get(name, 0.0) else value
            for name, value in now.items()
        }


def _first_known(found: Mapping[str, list[float]], names: tuple[str, ...]) -> list[float] | None:
    return next((found[name] for name in names if name in found), None)


def _sum(values: list[float] | None) -> float | None:
    return None if values is None else sum(values)
