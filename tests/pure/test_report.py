"""The report: definitions on hand-made outcomes, its JSON, its page and its table."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from penstock.core.metrics import RequestOutcome, Slo
from penstock.core.reasons import FinishReason
from penstock.workloads import report_html, wording
from penstock.workloads.charts import Chart, Marker, Series, nice_ticks, render, standalone
from penstock.workloads.report import (
    INTERRUPTED,
    ClientFacts,
    Energy,
    Report,
    ReportInput,
    Summary,
    outcome_row,
)
from penstock.workloads.report_facts import facts
from penstock.workloads.report_table import print_report
from penstock.workloads.server_metrics import ServerSeries
from penstock.workloads.timeline import BUCKETS_MAX, bucket_width_s, timeline_of

HOSTILE = '</script><img src=x onerror=alert(1)>[bold]&"'


def answered(
    arrival_s: float, ttft_s: float, tokens: int = 5, gap_s: float = 0.1, slo_class: str = "chat"
) -> RequestOutcome:
    first_s = arrival_s + ttft_s
    last_s = first_s + gap_s * (tokens - 1)
    return RequestOutcome(
        f"r{arrival_s}", arrival_s, FinishReason.LENGTH, last_s, 10, tokens, 4, first_s, last_s,
        [gap_s] * (tokens - 1), slo_class=slo_class,
    )  # fmt: skip


def lost(arrival_s: float, code: str = "overloaded") -> RequestOutcome:
    finish = FinishReason.CANCELLED if code == INTERRUPTED else FinishReason.REFUSED
    return RequestOutcome("x", arrival_s, finish, arrival_s + 0.01, 10, error_code=code, slo_class="chat")


def given_run(*outcomes: RequestOutcome, **changes: object) -> ReportInput:
    base = ReportInput("replay", "trace", outcomes, {"chat": Slo(ttft_ms=500, tpot_ms=150)})
    return replace(base, **changes)  # type: ignore[arg-type]


FULL = given_run(
    *(answered(0.5 * i, 0.1 * (1 + i % 7)) for i in range(40)),
    lost(3.0, HOSTILE),
    title=HOSTILE,
    warmup_s=1.0,
    sent_s=[0.5 * i + 0.001 for i in range(41)],
    client=ClientFacts(Summary(41, 1, 1, 1, 1, 1, 1), 9, 0, HOSTILE, 0, 1, 1.5),
    server=ServerSeries([0.0, 1.0], [1, 2], [0, None], [0.1, 0.9], {"preemptions": 3}),
    configuration={"url": HOSTILE, "model": HOSTILE},
    notes=[HOSTILE],
)


def test_lost_requests_count_as_misses() -> None:
    report = Report.build(given_run(answered(0, 0.1), answered(1, 0.9), lost(2), lost(3, "client_timeout")))
    assert (report.requests.measured, report.requests.answered, report.requests.lost) == (4, 2, 2)
    assert report.requests.errors == {"overloaded": 1, "client_timeout": 1}
    assert report.goodput.attained_frac == 0.25
    (chat,) = report.classes
    assert (chat.ttft_attained_frac, chat.tpot_attained_frac, chat.e2e_attained_frac) == (0.25, 0.5, None)
    assert report.latency_ms["ttft"] and report.latency_ms["ttft"].count == 2


def test_span_rates_and_tokens() -> None:
    report = Report.build(given_run(answered(1, 0.1), answered(2, 0.1), answered(3, 0.6)))
    assert report.span_s == pytest.approx(3.0)  # from 1.0 to 3 + 0.6 + 0.4
    assert report.rates.requested_rps == pytest.approx(1.0)
    assert report.rates.answered_rps == pytest.approx(1.0)
    assert report.rates.output_tokens_per_s == pytest.approx(5.0)
    assert (report.tokens.prompt, report.tokens.cached, report.tokens.output) == (30, 12, 15)
    assert report.goodput.goodput_rps == pytest.approx(2 / 3)


def test_realised_rate_is_of_the_sends() -> None:
    report = Report.build(given_run(answered(0, 1), answered(1, 1), answered(2, 1), sent_s=[0.0, 2.0, 4.0]))
    assert (report.rates.requested_rps, report.rates.realised_rps) == (1.0, 0.5)


def test_warm_up_and_interrupted_requests_are_left_out() -> None:
    report = Report.build(
        given_run(answered(0, 9), answered(5, 0.1), lost(1), lost(6, INTERRUPTED), warmup_s=2.0)
    )
    counts = report.requests
    assert (counts.total, counts.measured, counts.warmup, counts.interrupted, counts.lost) == (4, 1, 2, 1, 0)
    assert report.goodput.attained_frac == 1.0


def test_latency_definitions() -> None:
    report = Report.build(given_run(answered(0, 0.2, tokens=3, gap_s=0.05), answered(1, 0.4, tokens=1)))
    ttft, itl, tpot, e2e = (report.latency_ms[name] for name in ("ttft", "itl", "tpot", "e2e"))
    assert ttft and itl and tpot and e2e
    assert (ttft.mean, ttft.max) == pytest.approx((300, 400))
    assert (itl.count, itl.p50) == (2, pytest.approx(50))
    assert (tpot.count, tpot.p50) == (1, pytest.approx(50))
    assert e2e.max == pytest.approx(400)


def test_classes_without_slo_are_left_out() -> None:
    report = Report.build(
        given_run(
            answered(0, 0.1), answered(0, 9, slo_class="batch"), slos={"chat": Slo(500), "batch": Slo()}
        )
    )
    assert [item.slo_class for item in report.classes] == ["chat"]
    assert report.goodput.requests == 1


def test_the_reader_is_told_how_many_requests_carry_no_slo() -> None:
    chat, batch = answered(0, 0.1), answered(0, 9, slo_class="batch")
    for outcomes, said in (
        ([chat], "100 % of requests within their SLO"),
        ([chat, batch], "100 % of requests within their SLO; 1 has none"),
        ([chat, batch, batch], "100 % of requests within their SLO; 2 have none"),
        ([batch], "no request has an SLO"),
    ):
        report = Report.build(given_run(*outcomes, slos={"chat": Slo(500)}))
        terminal = Console(file=io.StringIO(), width=100)
        print_report(report, terminal)
        shown = next(line for line in terminal.file.getvalue().splitlines() if "goodput" in line)
        assert shown.rstrip().endswith(f"req/s, {said}")
        assert said in report_html.render(report)


def test_nothing_measured_is_a_report_too() -> None:
    for outcomes in ((), (lost(0),), (lost(0, INTERRUPTED),)):
        report = Report.build(given_run(*outcomes))
        json.dumps(report.to_json(), allow_nan=False)
        assert "no data" in report_html.render(report)


def test_json_is_versioned_and_finite() -> None:
    found = json.loads(json.dumps(Report.build(FULL).to_json(), allow_nan=False))
    assert (found["schema"], found["version"]) == ("penstock-report", 1)
    assert len(found["cdf_ms"]["ttft"]) == len(found["cdf_fractions"])
    assert found["goodput"].keys() == {"requests", "attained", "span_s", "goodput_rps", "attained_frac"}


def test_energy_is_told_by_token_and_by_request() -> None:
    outcomes = [answered(0, 0.1, tokens=30), answered(1, 0.1, tokens=10), lost(2)]
    energy = Energy.of(500.0, 2.0, outcomes, "published")
    assert (energy.joules_per_output_token, energy.joules_per_request) == (12.5, 250.0)
    report = Report.build(given_run(*outcomes, energy=energy))
    assert report.to_json()["energy"]["joules_per_output_token"] == 12.5
    told = dict(facts(report))["energy while computing"]
    assert told == "0.5 kJ, 12.5 J an output token, 250 J a request (power figures: published)"


def test_energy_without_answers_has_no_quotients() -> None:
    energy = Energy.of(500.0, 2.0, [lost(0)], "published")
    assert energy.joules_per_output_token is None and energy.joules_per_request is None
    assert Report.build(given_run(lost(0))).to_json()["energy"] is None, "and a replay knows none at all"


def test_outcome_rows() -> None:
    row = outcome_row(answered(1, 0.25), 1.002)
    assert (row["ttft_ms"], row["e2e_ms"], row["outcome"], row["sent_s"]) == (250.0, 650.0, "length", 1.002)
    assert outcome_row(lost(1), None)["ttft_ms"] is None


def test_timeline_conserves_requests_and_tokens() -> None:
    outcomes = [answered(0.3 * i, 0.2, tokens=7) for i in range(50)] + [lost(2.0)]
    outcomes.append(replace(answered(4, 0.2, tokens=900), itl_s=[]))  # the twin may know no gaps
    line = timeline_of(outcomes)
    assert sum(line.arrivals_per_s) * line.bucket_s == pytest.approx(52)
    assert sum(line.answered_per_s) * line.bucket_s == pytest.approx(51)
    assert sum(line.lost_per_s) * line.bucket_s == pytest.approx(1)
    assert sum(line.output_tokens_per_s) * line.bucket_s == pytest.approx(50 * 7 + 900)


@given(st.floats(0, 1e9))
def test_timelines_are_bounded(end_s: float) -> None:
    assert end_s / bucket_width_s(end_s) <= BUCKETS_MAX


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and the text it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")], "no inline handlers"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escaped() -> None:
    html = report_html.render(Report.build(FULL))
    page = Page()
    page.feed(html)
    assert not page.links and "img" not in page.tags, "nothing is fetched, nothing foreign became markup"
    assert "default-src 'none'" in html
    assert page.text.count(HOSTILE) >= 4, "title, note, model and prompts are shown as text"
    assert page.tags.count("svg") == 8
    for word in ("Arrivals and answers", "KV cache use", "SLO attainment", "preemptions"):
        assert word in page.text


def test_every_picture_is_well_formed() -> None:
    html = report_html.render(Report.build(FULL))
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        assert "nan" not in svg and "inf" not in svg
        assert len(ElementTree.fromstring(svg)) > 3
    for data in re.findall(r'<script type="application/json">(.*?)</script>', html, re.S):
        points = json.loads(data)
        assert all(len(series["y"]) == len(points["x"]) for series in points["series"])


@pytest.mark.parametrize("names", [["one"], ["one", HOSTILE]])
def test_a_picture_of_its_own_is_a_whole_document(names: list[str]) -> None:
    """Well formed, escaped, fetching nothing, and with colours for light and dark."""
    lines = [Series(name, f"s{index + 1}", [1.0, 3.0, None, 2.0]) for index, name in enumerate(names)]
    chart = Chart(HOSTILE, HOSTILE, [0, 1, 2, 3], lines, str, str, markers=[Marker(1, HOSTILE)])
    text = standalone(chart)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in text
    assert "<script" not in text and not re.search(r"href=|url\(|@import", text)
    said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert said.count(HOSTILE) == 3 + (len(names) > 1), "title, subtitle, marker, and the legend of several"
    assert ElementTree.fromstring(standalone(replace(chart, xs=[], series=[]))) is not None


def test_chart_data_cannot_end_its_script() -> None:
    chart = Chart(HOSTILE, HOSTILE, [0, 1], [Series(HOSTILE, "s1", [1, 2])], wording.seconds, wording.number)
    html = render(chart)
    assert html.count("</script>") == 1 and "<img" not in html
    data = re.search(r'<script type="application/json">(.*)</script>', html)
    assert data and json.loads(data[1])["series"][0]["name"] == HOSTILE


@given(
    st.lists(st.floats(0, 1e12) | st.none(), min_size=2, max_size=30),
    st.booleans(),
    st.floats(1e-3, 1e9),
)
def test_any_series_can_be_drawn(ys: list[float | None], is_log: bool, target: float) -> None:
    xs = [0.01 + index for index in range(len(ys))]
    chart = Chart("t", "s", xs, [Series("a", "s1", ys, True)], wording.seconds, wording.number, is_log)
    html = render(replace(chart, markers=[Marker(target, "SLO")]))
    assert "nan" not in html and ("<polyline" in html or "<circle" in html or "no data" in html)


@given(st.floats(1e-9, 1e15), st.integers(2, 8))
def test_ticks_are_few_and_reach_the_top(high: float, count: int) -> None:
    ticks = nice_ticks(high, count)
    assert ticks[0] == 0 and ticks[-1] >= high * (1 - 1e-6)
    assert 2 <= len(ticks) <= count + 2


def test_the_table_shows_foreign_names_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    print_report(Report.build(FULL), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]" in text and "38 of 39, 1 lost" in text and "TTFT" in text and "note: " in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4167, "0.42 ms"),
        (9.999, "10 ms"),
        (37.2, "37 ms"),
        (1000, "1 s"),
        (1234, "1.23 s"),
        (186_000, "3.1 min"),
    ],
)
def test_milliseconds(value: float, text: str) -> None:
    assert wording.milliseconds(value) == text


def test_percent_never_rounds_up_to_all() -> None:
    assert (wording.percent(0.99999), wording.percent(1.0), wording.percent(0.29)) == (
        "99.9 %",
        "100 %",
        "29 %",
    )
