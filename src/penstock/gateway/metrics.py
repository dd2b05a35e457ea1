"""Prometheus metrics: one registry an app, ours as `penstock:*` and the same values under vLLM's names.

Requests are counted as they end, tokens as they come; the engine's own counters are read from its last step
report when somebody scrapes. Definitions are in `core/metrics.py` and `docs/api.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from penstock.core.metrics import (
    LATENCY_EDGES_S,
    TOKEN_EDGES,
    TPOT_EDGES_S,
    TTFT_EDGES_S,
    RequestOutcome,
    Slo,
)
from penstock.core.reasons import CancelReason, ShedReason
from penstock.core.step_trace import StepRecord
from penstock.gateway.drift import PredictStep, StepDrift
from penstock.gateway.tenants import OUTPUT, PROMPT, TenantBook
from penstock.replica.messages import ReplicaInfo, ReplicaStats

OURS, ALIAS = "penstock:", "vllm:"

# Ours that vLLM has too, under the same name after the colon; dashboards and autoscalers carry over.
ALIASED = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_waiting_by_reason",
        "kv_cache_usage_perc",
        "cache_config_info",
        "prompt_tokens",
        "generation_tokens",
        "num_preemptions",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "prompt_tokens_cached",
        "request_success",
        "admission_rejections",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "iteration_tokens_total",
    }
)


@dataclass(slots=True)
class PhaseSpans:
    """Where a request's time went, the wait at the desk included in `queue_s`. They add up to its E2E."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preempted_s: float = 0.0
    overhead_s: float = 0.0


@dataclass(slots=True)
class EngineView:
    """What a scrape shows of engine and desk: the state now, set by the switchboard."""

    stats: ReplicaStats
    desk_requests: int = 0
    desk_tokens: int = 0
    calls_open: int = 0
    is_healthy: bool = True
    heartbeat_age_s: float = 0.0
    is_draining: bool = False
    recorded: int = 0
    record_dropped: int = 0


class GatewayMetrics:
    """Counts what happens. Methods are cheap; nothing here blocks."""

    def __init__(
        self,
        info: ReplicaInfo,
        slos: Mapping[str, Slo],
        predict_step: PredictStep | None = None,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._slos = slos
        self._drift = None if predict_step is None else StepDrift(predict_step)
        self._labels = {"model_name": info.model, "engine": info.engine}
        self.engine = EngineView(ReplicaStats())
        self.tenants = TenantBook(tenant_weights or {})
        self._inner = CollectorRegistry(auto_describe=False)
        self._make_counters()
        self._make_histograms()
        self._make_fixed_gauges(info)
        self._outer = CollectorRegistry(auto_describe=False)
        self._outer.register(_Exposition(self._inner, self.engine, self.tenants, self._labels))

    def render(self) -> bytes:
        """The text exposition of everything."""
        return generate_latest(self._outer)

    def tokens(self, count: int) -> None:
        """Output tokens of one step arrived."""
        self._generation_tokens.inc(count)

    def gap(self, gap_s: float) -> None:
        """A token came `gap_s` after the one before it."""
        self._itl.observe(gap_s)

    def step(self, stats: ReplicaStats) -> None:
        """A report came in. Not every one tells of a new step: a cancelled request makes one too."""
        is_new_step = stats.step_index != self.engine.stats.step_index
        self.engine.stats = stats
        if is_new_step and stats.step_tokens:
            self._step_tokens.observe(stats.step_tokens)
            self._step.observe(stats.step_s)
            self._schedule.observe(stats.schedule_s)

    def compare(self, record: StepRecord) -> None:
        """A step's work and time, against what the profile says of it."""
        if self._drift is None:
            return
        self._drift.observe(record)
        for kind, error_frac in (("signed", self._drift.signed), ("absolute", self._drift.absolute)):
            if error_frac is not None:
                self._twin_error.labels(kind=kind, **self._labels).set(error_frac)

    def shed(self, reason: ShedReason) -> None:
        self._rejections.inc()
        self._shed.labels(reason=reason.value, **self._labels).inc()

    def storm(self, cause: str) -> None:
        """Much of the work has become work done before."""
        self._storms.labels(cause=cause, **self._labels).inc()

    def cancelled(self, reason: CancelReason) -> None:
        self._cancelled.labels(reason=reason.value, **self._labels).inc()

    def refused(self, status: int, code: str | None) -> None:
        """An error answer left, of whatever kind."""
        self._errors.labels(status=str(status), code=code or "none", **self._labels).inc()

    def finished(self, outcome: RequestOutcome, phases: PhaseSpans) -> None:
        """A request ended, however."""
        self._success.labels(finished_reason=outcome.finish.value, **self._labels).inc()
        self._count_slo(outcome)
        if not outcome.is_answered:
            return
        self._prompt_tokens.inc(outcome.prompt_tokens)
        self._cached_tokens.inc(outcome.cached_tokens)
        self._request_prompt.observe(outcome.prompt_tokens)
        self._request_generation.observe(outcome.output_tokens)
        self._e2e.observe(outcome.e2e_s)
        if outcome.tpot_s is not None:
            self._tpot.observe(outcome.tpot_s)
        self._queue.observe(phases.queue_s)
        self._prefill.observe(phases.prefill_s)
        self._decode.observe(phases.decode_s)
        self._inference.observe(phases.prefill_s + phases.decode_s)
        self._preempted.observe(phases.preempted_s)
        self._overhead.observe(max(0.0, phases.overhead_s))

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def _count_slo(self, outcome: RequestOutcome) -> None:
        slo = self._slos.get(outcome.slo_class)
        if slo is None or not outcome.is_answered:
            return
        measured = (
            ("ttft", outcome.ttft_s, slo.ttft_ms),
            ("tpot", outcome.tpot_s, slo.tpot_ms),
            ("e2e", outcome.e2e_s, slo.e2e_ms),
        )
        for name, value_s, target_ms in measured:
            if target_ms is not None and (value_s is None or value_s * 1e3 <= target_ms):
                self._slo.labels(outcome.tenant, outcome.slo_class, name).inc()

    def _make_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Of those, found in the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Output tokens.")
        self._rejections = self._counter("admission_rejections", "Calls refused at the door though valid.")
        self._success = self._reasons("request_success", "Requests that ended, by how.", "finished_reason")
        self._shed = self._reasons("shed", "Calls refused at the door, by why.", "reason")
        self._cancelled = self._reasons("cancelled", "Calls cancelled before their end, by why.", "reason")
        self._storms = self._reasons(
            "preemption_storms", "Times that preemption got out of hand, by the main cause.", "cause"
        )
        self._errors = Counter(
            OURS + "error_answers",
            "Error answers, by status and code.",
            ["status", "code", *self._labels],
            registry=self._inner,
        )
        self._slo = Counter(
            OURS + "slo_attained",
            "Answered requests within a target of their class.",
            ["tenant", "class", "slo"],
            registry=self._inner,
        )

    def _make_histograms(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_EDGES_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Gaps between tokens.", TPOT_EDGES_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "(last - first) / (tokens - 1).", TPOT_EDGES_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to finish.", LATENCY_EDGES_S)
        self._queue = self._histogram(
            "request_queue_time_seconds", "Waiting, at desk and engine.", LATENCY_EDGES_S
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Admitted to first token.", LATENCY_EDGES_S
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "First token to finish.", LATENCY_EDGES_S
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "Prefill + decode.", LATENCY_EDGES_S
        )
        self._preempted = self._histogram(
            "request_preempted_time_seconds", "Between preemption and readmission.", LATENCY_EDGES_S
        )
        self._overhead = self._histogram(
            "request_overhead_seconds", "E2E that is neither waiting nor engine.", TTFT_EDGES_S
        )
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt lengths.", TOKEN_EDGES)
        self._request_generation = self._histogram(
            "request_generation_tokens", "Output lengths.", TOKEN_EDGES
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in a step.", TOKEN_EDGES
        )
        self._step = self._histogram("step_seconds", "Duration of a step.", TPOT_EDGES_S)
        self._schedule = self._histogram("step_schedule_seconds", "Of that, deciding.", TTFT_EDGES_S)

    def _make_fixed_gauges(self, info: ReplicaInfo) -> None:
        startup = Gauge(
            OURS + "startup_seconds", "Stages of the start.", ["stage", *self._labels], registry=self._inner
        )
        for stage, seconds in info.startup_s.items():
            startup.labels(stage=stage, **self._labels).set(seconds)
        self._twin_error = Gauge(
            OURS + "twin_error_frac",
            "The profile's seconds of a step over the measured ones, less 1; mean of about 1000 steps. Only "
            "with `twin.profile`.",
            ["kind", *self._labels],
            registry=self._inner,
        )
        shape = {
            "block_size": str(info.kv_block_tokens),
            "num_gpu_blocks": str(info.kv_blocks),
            "cache_dtype": info.dtype,
        }
        cache = Gauge(
            OURS + "cache_config_info", "The KV pool; 1.", [*shape, *self._labels], registry=self._inner
        )
        cache.labels(**shape, **self._labels).set(1)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(OURS + name, help, list(self._labels), registry=self._inner).labels(**self._labels)

    def _reasons(self, name: str, help: str, label: str) -> Counter:
        return Counter(OURS + name, help, [label, *self._labels], registry=self._inner)

    def _histogram(self, name: str, help: str, edges: tuple[float, ...]) -> Histogram:
        histogram = Histogram(OURS + name, help, list(self._labels), buckets=edges, registry=self._inner)
        return histogram.labels(**self._labels)


class _Exposition(Collector):
    """Everything under our names, followed by the same under vLLM's where it has them."""

    def __init__(
        self, inner: CollectorRegistry, view: EngineView, tenants: TenantBook, labels: Mapping[str, str]
    ) -> None:
        self._inner = inner
        self._view = view
        self._tenants = tenants
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        for family in self._families():
            yield family
            short_name = family.name.removeprefix(OURS)
            if short_name in ALIASED:
                yield _renamed(family, ALIAS + short_name)

    def _families(self) -> Iterator[Metric]:
        for family in self._inner.collect():
            # The creation times that the library adds double the series and help nobody here.
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
        yield from self._gauges()
        yield from self._counters()
        yield from self._by_tenant()

    def _gauges(self) -> Iterator[Metric]:
        view, stats = self._view, self._view.stats
        blocks = stats.kv_blocks_used + stats.kv_blocks_cached + stats.kv_blocks_free
        waiting = stats.waiting + view.desk_requests
        yield self._gauge("num_requests_running", "Requests that run.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait, at desk and engine.", waiting)
        by_reason = self._family("num_requests_waiting_by_reason", "The same, as vLLM splits it.", "reason")
        by_reason.add_metric(["capacity", *self._labels.values()], waiting)
        by_reason.add_metric(["deferred", *self._labels.values()], 0)
        yield by_reason
        causes = self._family("waiting_requests", "Requests that wait, by what for.", "reason")
        for reason, count in {"desk": view.desk_requests, **stats.waiting_by_reason}.items():
            causes.add_metric([reason, *self._labels.values()], count)
        yield causes
        yield self._gauge("waiting_tokens", "Tokens that wait.", stats.waiting_tokens + view.desk_tokens)
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of KV blocks held by live sequences and pins, 0 to 1.",
            stats.kv_blocks_used / blocks if blocks else 0.0,
        )
        yield self._gauge("kv_blocks_pinned", "Blocks that pins hold between turns.", stats.kv_blocks_pinned)
        yield self._gauge("host_kv_blocks_used", "Blocks of KV in host memory.", stats.host_kv_blocks_used)
        yield self._gauge("pins", "Programs whose KV is pinned.", stats.pins)
        yield self._gauge("kv_blocks_cached", "Unused blocks that may still be hit.", stats.kv_blocks_cached)
        yield self._gauge("calls_open", "HTTP calls in flight.", view.calls_open)
        yield self._gauge("engine_healthy", "1 when the engine is alive and moving.", int(view.is_healthy))
        yield self._gauge("engine_heartbeat_age_seconds", "Since it last moved.", view.heartbeat_age_s)
        yield self._gauge("draining", "1 while shutting down.", int(view.is_draining))

    def _counters(self) -> Iterator[Metric]:
        stats = self._view.stats
        for name, help, value in (
            ("num_preemptions", "Preemptions.", stats.preemptions_total),
            ("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_query_tokens_total),
            ("prefix_cache_hits", "Prompt tokens found.", stats.prefix_hit_tokens_total),
            ("swap_stall_seconds", "Steps waited for copies of KV.", stats.swap_stall_s_total),
            ("swap_failures", "Copies of KV that failed; computed again.", stats.swap_failures_total),
        ):
            counter = CounterMetricFamily(OURS + name, help, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter
        recorded = {"written": self._view.recorded, "dropped": self._view.record_dropped}
        for name, help, label, values in (
            ("preempted_tokens_lost", "Tokens computed again.", "cause", stats.preempted_tokens_total),
            ("prefix_miss_tokens", "Prompt tokens not found.", "reason", stats.prefix_miss_tokens_total),
            (
                "swaps",
                "Sequences whose KV was copied, by way: out to the host, or in.",
                "way",
                stats.swaps_total,
            ),
            ("swap_copies", "Runs of KV blocks, each copied at once.", "way", stats.swap_copies_total),
            ("swap_blocks", "KV blocks copied.", "way", stats.swap_blocks_total),
            ("swap_bytes", "Bytes of KV copied.", "way", stats.swap_bytes_total),
            ("pin_events", "Pins of programs' KV, by what happened.", "event", stats.pins_total),
            ("request_log_rows", "Ends of requests, by what became of them in the log.", "result", recorded),
        ):
            counter = CounterMetricFamily(OURS + name, help, labels=[label, *self._labels])
            for reason, value in values.items():
                counter.add_metric([reason, *self._labels.values()], value)
            yield counter

    def _by_tenant(self) -> Iterator[Metric]:
        book = self._tenants
        for name, help, counts in (
            ("tenant_requests_running", "Requests that run, by tenant.", book.running),
            ("tenant_requests_waiting", "Requests that wait, by tenant.", book.waiting),
        ):
            family = self._family(name, help, "tenant")
            for label in book.labels:
                family.add_metric([label, *self._labels.values()], counts[label])
            yield family
        served = CounterMetricFamily(
            OURS + "tenant_service_tokens",
            "Tokens served, by tenant.",
            labels=["tenant", "kind", *self._labels],
        )
        for label in book.labels:
            for kind in (PROMPT, OUTPUT):
                served.add_metric([label, kind, *self._labels.values()], book.served[label, kind])
        yield served
        yield self._gauge(
            "tenant_fairness_gap_tokens",
            "Largest difference of weighted service between tenants that wait.",
            book.gap_tokens(),
        )

    def _gauge(self, name: str, help: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(OURS + name, help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _family(self, name: str, help: str, label: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(OURS + name, help, labels=[label, *self._labels])


def _renamed(family: Metric, name: str) -> Metric:
    """The same samples under another family name."""
    copy = Metric(name, family.documentation, family.type)
    copy.samples = [
        Sample(name + sample.name.removeprefix(family.name), sample.labels, sample.value)
        for sample in family.samples
    ]
    return copy
