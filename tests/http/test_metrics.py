"""The names of the metrics are a contract; so is what they count."""

from __future__ import annotations

from collections.abc import Callable

from fake_link import FakeLink, make_info
from prometheus_client.parser import text_string_to_metric_families
from served import Running, make_settings

from penstock.core.metrics import TTFT_EDGES_S, Slo

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}

SHARED = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "num_requests_waiting_by_reason": "gauge",
    "kv_cache_usage_perc": "gauge",
    "cache_config_info": "gauge",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "num_preemptions": "counter",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prompt_tokens_cached": "counter",
    "request_success": "counter",
    "admission_rejections": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "iteration_tokens_total": "histogram",
}
OURS_ONLY = {
    "shed": "counter",
    "cancelled": "counter",
    "error_answers": "counter",
    "slo_attained": "counter",
    "preempted_tokens_lost": "counter",
    "preemption_storms": "counter",
    "tenant_requests_running": "gauge",
    "tenant_requests_waiting": "gauge",
    "tenant_service_tokens": "counter",
    "tenant_fairness_gap_tokens": "gauge",
    "prefix_miss_tokens": "counter",
    "pin_events": "counter",
    "swaps": "counter",
    "swap_copies": "counter",
    "swap_blocks": "counter",
    "swap_bytes": "counter",
    "swap_stall_seconds": "counter",
    "swap_failures": "counter",
    "host_kv_blocks_used": "gauge",
    "request_log_rows": "counter",
    "request_preempted_time_seconds": "histogram",
    "request_overhead_seconds": "histogram",
    "step_seconds": "histogram",
    "step_schedule_seconds": "histogram",
    "startup_seconds": "gauge",
    "twin_error_frac": "gauge",
    "waiting_requests": "gauge",
    "waiting_tokens": "gauge",
    "kv_blocks_cached": "gauge",
    "kv_blocks_pinned": "gauge",
    "pins": "gauge",
    "calls_open": "gauge",
    "engine_healthy": "gauge",
    "engine_heartbeat_age_seconds": "gauge",
    "draining": "gauge",
}


def scrape(running: Running) -> dict[str, float]:
    """Sample name with its telling labels, in order of their names → value."""
    values = {}
    for family in text_string_to_metric_families(running.http().get("/metrics").text):
        for sample in family.samples:
            telling = [sample.labels[key] for key in sorted(sample.labels.keys() - {"model_name", "engine"})]
            values[" ".join([sample.name, *telling])] = sample.value
    return values


def test_the_names_and_types_are_pinned(gateway: Running) -> None:
    answer = gateway.http().get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {family.name: family.type for family in text_string_to_metric_families(answer.text)}
    expected = {f"penstock:{name}": kind for name, kind in {**SHARED, **OURS_ONLY}.items()}
    expected |= {f"vllm:{name}": kind for name, kind in SHARED.items()}
    assert found == expected


def test_a_request_is_counted_once_and_under_both_names(serve: Callable[..., Running]) -> None:
    running = serve()
    assert running.http().post(CHAT, json=BODY).status_code == 200
    running.wait_idle()
    values = scrape(running)
    for prefix in ("penstock:", "vllm:"):
        assert values[f"{prefix}generation_tokens_total"] == 5
        assert values[f"{prefix}prompt_tokens_total"] == 20
        assert values[f"{prefix}prompt_tokens_cached_total"] == 10
        assert values[f"{prefix}request_success_total length"] == 1
        assert values[f"{prefix}time_to_first_token_seconds_count"] == 1
        assert values[f"{prefix}inter_token_latency_seconds_count"] == 4
        assert values[f"{prefix}e2e_request_latency_seconds_count"] == 1
        assert values[f"{prefix}request_generation_tokens_sum"] == 5
        assert values[f"{prefix}num_requests_running"] == 0
    edges = [key for key in values if key.startswith("vllm:time_to_first_token_seconds_bucket")]
    assert len(edges) == len(TTFT_EDGES_S) + 1
    assert values["penstock:startup_seconds load"] == 0.5
    assert not any(key.split()[0].endswith("_created") for key in values)


def test_phases_add_up_to_e2e(serve: Callable[..., Running]) -> None:
    running = serve(link=FakeLink(step_s=0.01))
    assert running.http().post(CHAT, json=BODY).status_code == 200
    running.wait_idle()
    values = scrape(running)
    phases = ("queue_time", "prefill_time", "decode_time", "preempted_time", "overhead")
    total_s = sum(values[f"penstock:request_{phase}_seconds_sum"] for phase in phases)
    assert abs(total_s - values["penstock:e2e_request_latency_seconds_sum"]) < 1e-6


def test_refusals_errors_and_cancels_are_counted_by_why(serve: Callable[..., Running]) -> None:
    link = FakeLink(step_s=0.01, info=make_info(running_max=1))
    running = serve(make_settings(desk={"queue_requests_max": 0, "engine_ahead": 0}), link)
    stream = running.openai().chat.completions.create(
        model="fake", messages=BODY["messages"], max_tokens=2000, stream=True
    )
    next(iter(stream))
    assert running.http().post(CHAT, json=BODY).status_code == 503
    assert running.http().post(CHAT, json={**BODY, "temperature": 9}).status_code == 400
    stream.close()
    running.wait_idle()
    values = scrape(running)
    assert values["penstock:shed_total queue_requests"] == values["vllm:admission_rejections_total"] == 1
    assert values["penstock:error_answers_total overloaded 503"] == 1
    assert values["penstock:error_answers_total none 400"] == 1
    assert values["penstock:cancelled_total client_disconnect"] == 1
    assert values["vllm:request_success_total cancelled"] == 1


def test_attainment_is_counted_for_the_class_asked_for(serve: Callable[..., Running]) -> None:
    slos = {"chat": Slo(ttft_ms=60_000.0, e2e_ms=0.0001)}
    running = serve(make_settings(slo=slos))
    assert running.http().post(CHAT, json=BODY, headers={"x-penstock-class": "chat"}).status_code == 200
    assert running.http().post(CHAT, json=BODY).status_code == 200
    running.wait_idle()
    values = scrape(running)
    assert values["penstock:slo_attained_total chat ttft default"] == 1
    assert "penstock:slo_attained_total chat e2e default" not in values
    assert [request.slo_class for _, request in running.outcomes] == ["chat", "default"]
