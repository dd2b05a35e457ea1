"""Tenant and class of a call: the headers, what is refused, and what is counted for whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_link import FakeLink, make_info
from served import Running, make_settings, wait_until
from test_metrics import scrape

from penstock.core.events import Preempted
from penstock.core.metrics import Slo
from penstock.core.reasons import PreemptReason
from penstock.core.settings import PolicySettings, TenantSettings
from penstock.replica.messages import ReplicaStats, StepReport

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
TENANT, CLASS, OBJECTIVE = (
    "x-gateway-inference-fairness-id",
    "x-penstock-class",
    "x-gateway-inference-objective",
)


def post(running: Running, headers: dict[str, str], **body: Any) -> Any:
    return running.http().post(CHAT, json={**BODY, **body}, headers=headers)


def test_the_tenant_reaches_the_engine(serve: Callable[..., Running]) -> None:
    running = serve()
    assert post(running, {TENANT: "acme"}).status_code == 200
    assert post(running, {}).status_code == 200
    assert [request.tenant for request in running.link.submitted] == ["acme", "default"]


def test_the_operator_names_the_header_or_turns_it_off(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(gateway={"tenant_header": "x-team"}))
    assert post(running, {TENANT: "acme", "x-team": "blue"}).status_code == 200
    assert running.link.submitted[-1].tenant == "blue"
    running = serve(make_settings(gateway={"tenant_header": ""}))
    assert post(running, {TENANT: "acme"}).status_code == 200
    assert running.link.submitted[-1].tenant == "default"


@pytest.mark.parametrize("name", ["", "x" * 201, "caf\u00e9", "tab\there"])
def test_a_name_that_nobody_should_print_is_refused(serve: Callable[..., Running], name: str) -> None:
    answer = serve().http().post(CHAT, json=BODY, headers={TENANT: name.encode("latin-1")})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == TENANT


def test_a_class_must_be_one_that_is_defined(serve: Callable[..., Running]) -> None:
    running = serve(make_settings(slo={"chat": Slo(ttft_ms=1.0)}))
    for header in (CLASS, OBJECTIVE):
        assert post(running, {header: "chat"}).status_code == 200
        answer = post(running, {header: "nonsense"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == header
        assert "Defined: `chat`." in answer.json()["error"]["message"]
    assert [request.slo_class for request in running.link.submitted] == ["chat", "chat"]
    answer = post(running, {CLASS: "chat", OBJECTIVE: "default"})
    assert answer.status_code == 400 and "different classes" in answer.json()["error"]["message"]


def test_a_server_without_classes_takes_the_objective_as_a_label(serve: Callable[..., Running]) -> None:
    running = serve()
    assert post(running, {OBJECTIVE: "anything"}).status_code == 200
    assert running.link.submitted[-1].slo_class == "anything"
    assert post(running, {CLASS: "anything"}).status_code == 400
    assert post(running, {OBJECTIVE: "x" * 300}).status_code == 400


def test_classes_with_a_priority_are_defined_as_well(serve: Callable[..., Running]) -> None:
    policies = PolicySettings(rank="priority", options={"priority": {"classes": ["interactive=-1"]}})
    link = FakeLink(info=make_info(policies={"rank": "priority"}))
    running = serve(make_settings(policies=policies), link)
    assert post(running, {OBJECTIVE: "interactive"}).status_code == 200
    assert post(running, {OBJECTIVE: "other"}).status_code == 400


def test_a_priority_is_refused_where_nobody_reads_it(serve: Callable[..., Running]) -> None:
    answer = post(serve(), {}, priority=1)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"
    assert answer.json()["error"]["code"] == "unsupported_parameter"
    link = FakeLink(info=make_info(policies={"rank": "priority"}))
    running = serve(link=link)
    assert post(running, {}, priority=-3).status_code == 200
    assert running.link.submitted[-1].priority == -3


def test_requests_and_tokens_are_counted_by_tenant(serve: Callable[..., Running]) -> None:
    tenants = {"gold": TenantSettings(2.0)}
    running = serve(make_settings(tenants=tenants), FakeLink(step_s=0.01))
    assert post(running, {TENANT: "gold"}).status_code == 200
    stream = running.openai(default_headers={TENANT: "acme"}).chat.completions.create(
        model="fake", messages=BODY["messages"], max_tokens=2000, stream=True
    )
    next(iter(stream))
    wait_until(lambda: scrape(running).get("penstock:tenant_requests_running acme") == 1, "it runs")
    stream.close()
    running.wait_idle()
    values = scrape(running)
    assert values["penstock:tenant_service_tokens_total output gold"] == 5
    assert values["penstock:tenant_service_tokens_total prompt gold"] == 20
    assert values["penstock:tenant_requests_running acme"] == 0
    assert values["penstock:tenant_requests_waiting acme"] == 0
    assert values["penstock:tenant_fairness_gap_tokens"] == 0


def test_the_labels_are_bounded(serve: Callable[..., Running]) -> None:
    running = serve()
    for index in range(80):
        assert post(running, {TENANT: f"t{index}"}, max_tokens=1).status_code == 200
    running.wait_idle()
    values = scrape(running)
    labels = {key.split()[-1] for key in values if key.startswith("penstock:tenant_requests_running")}
    assert len(labels) == 65 and "other" in labels
    assert values["penstock:tenant_service_tokens_total output other"] == 16


def test_a_preemption_storm_is_counted_and_logged(
    serve: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(link=FakeLink(step_s=0.01))
    stream = running.openai().chat.completions.create(
        model="fake", messages=BODY["messages"], max_tokens=2000, stream=True
    )
    next(iter(stream))
    name = running.link.submitted[0].id
    events: list[Any] = [Preempted(name, 0.0, PreemptReason.OUTRANKED, 100, "boss") for _ in range(12)]
    running.link._report(StepReport(events, ReplicaStats(step_index=1 << 30, step_tokens=64)))
    wait_until(lambda: scrape(running).get("penstock:preemption_storms_total outranked") == 1, "it is told")
    stream.close()
    running.wait_idle()
    told = next(record.message for record in caplog.records if "preemption storm" in record.message)
    assert f"most often {name} (12 times)" in told and "mostly for boss" in told
