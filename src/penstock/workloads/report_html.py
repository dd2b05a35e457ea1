"""`report.html`: one self-contained page. Pure: a `Report` in, text out; everything foreign is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from penstock import __version__
from penstock.workloads import charts, wording
from penstock.workloads.charts import Chart, Marker, Series
from penstock.workloads.report import CDF_FRACTIONS, ClassAttainment, Report
from penstock.workloads.report_facts import facts
from penstock.workloads.report_style import CSS, SCRIPT

# Nothing may be fetched, whatever a hostile name in a trace manages to smuggle in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
_DEFINITIONS = (
    "TTFT counts from the instant a request was due; ITL is the gap between pieces of output; "
    "TPOT is (last − first) / (tokens − 1); lost requests miss every SLO."
)
_LATENCY_NAMES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "E2E"}


def render(report: Report) -> str:
    """The whole page."""
    body = "".join(
        (
            _header(report),
            _tiles(report),
            section("Load", pair(_arrivals_chart(report), _output_chart(report))),
            section("Latency", _latency_table(report), _trio(report), _ttft_over_time(report)),
            _slo_section(report),
            _server_section(report),
            section("Losses", _losses_table(report)) if report.requests.errors else "",
            section("How this was measured", _facts_table(report)),
        )
    )
    return page(f"{report.title} - penstock {report.kind}", body)


def page(title: str, body: str) -> str:
    """A whole document around `body`, which is HTML already; `title` is escaped here."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}"
        f"<footer>Penstock {escape(__version__)}. {_DEFINITIONS}</footer>"
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; empty parts leave no gap."""
    spaced = '<div style="height:12px"></div>'.join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>{spaced}</section>"


def pair(*figures: str) -> str:
    """Figures two in a row."""
    return f'<div class="pair">{"".join(figures)}</div>'


def trio(*figures: str) -> str:
    """Figures three in a row; they are `charts.SMALL` wide."""
    return f'<div class="trio">{"".join(figures)}</div>'


def _header(report: Report) -> str:
    chosen = ("url", "model", "created_utc")
    facts = [str(report.configuration[key]) for key in chosen if report.configuration.get(key)]
    shown = "".join(f'<div class="card note">{escape(text)}</div>' for text in report.notes)
    if report.interrupted:
        text = "The run was interrupted: this report covers what had ended by then."
        shown = f'<div class="card note bad">{text}</div>{shown}'
    return (
        f'<header><div class="kind">Penstock {escape(report.kind)}</div><h1>{escape(report.title)}</h1>'
        f"<p>{escape(' · '.join(facts))}</p></header>{shown}"
    )


def _tiles(report: Report) -> str:
    counts, rates = report.requests, report.rates
    lost = f"{counts.lost} lost" if counts.lost else "none lost"
    tiles = [
        _tile("Answered", f"{counts.answered} <small>of {counts.measured}</small>", lost, _tone(counts.lost)),
        _tile(
            "Realised rate",
            _rate(rates.realised_rps),
            f"requested {_plain_rate(rates.requested_rps)}",
        ),
        _latency_tile(report, "ttft", "Time to first token"),
        _latency_tile(report, "tpot", "Time per output token"),
        _tile(
            "Output",
            f"{wording.number(rates.output_tokens_per_s)} <small>tokens/s</small>",
            f"{wording.number(rates.prompt_tokens_per_s)} prompt tokens/s",
        ),
    ]
    if report.classes:
        tiles.append(
            _tile(
                "Goodput",
                f"{report.goodput.goodput_rps:.3g} <small>req/s</small>",
                wording.attained(report.goodput, report.requests.measured),
                "good" if report.goodput.attained_frac >= 0.99 else "",
            )
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tone(lost: int) -> str:
    return "bad" if lost else "good"


def _tile(name: str, value_html: str, note: str, tone: str = "") -> str:
    return (
        f'<div class="card tile {tone}"><div class="name">{escape(name)}</div>'
        f'<div class="value">{value_html}</div><div class="note">{escape(note)}</div></div>'
    )


def _latency_tile(report: Report, key: str, name: str) -> str:
    summary = report.latency_ms[key]
    if summary is None:
        return _tile(name, "-", "no answers")
    p50 = f"{escape(wording.milliseconds(summary.p50))} <small>p50</small>"
    return _tile(name, p50, f"p99 {wording.milliseconds(summary.p99)}")


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{wording.number(value)} <small>req/s</small>"


def _plain_rate(value: float | None) -> str:
    return "-" if value is None else f"{wording.number(value)} req/s"


def _warmup_markers(report: Report) -> tuple[Marker, ...]:
    return (Marker(report.warmup_s, "warm-up ends"),) if report.warmup_s > 0 else ()


def _arrivals_chart(report: Report) -> str:
    line = report.timeline
    series = [
        Series("arrivals", "s1", line.arrivals_per_s, is_area=True),
        Series("answered", "s3", line.answered_per_s),
    ]
    if any(line.lost_per_s):
        series.append(Series("lost", "lost", line.lost_per_s))
    subtitle = f"requests per second, in steps of {wording.seconds(line.bucket_s)}"
    return charts.render(
        Chart(
            "Arrivals and answers",
            subtitle,
            line.t_s,
            series,
            wording.seconds,
            wording.number,
            markers=_warmup_markers(report),
        )
    )


def _output_chart(report: Report) -> str:
    line = report.timeline
    series = [Series("output tokens/s", "s2", line.output_tokens_per_s, is_area=True)]
    return charts.render(
        Chart(
            "Throughput",
            "output tokens per second",
            line.t_s,
            series,
            wording.seconds,
            wording.number,
            markers=_warmup_markers(report),
        )
    )


def _ttft_over_time(report: Report) -> str:
    line = report.timeline
    series = [Series("p50", "s1", line.ttft_ms_p50), Series("p95", "s2", line.ttft_ms_p95)]
    chart = Chart(
        "TTFT over time",
        "by the second a request was due",
        line.t_s,
        series,
        wording.seconds,
        wording.milliseconds,
        markers=_warmup_markers(report),
        width=charts.WIDE,
    )
    return charts.render(chart)


def _trio(report: Report) -> str:
    first = report.classes[0].slo if len({item.slo for item in report.classes}) == 1 else None
    targets = {
        "ttft": None if first is None else first.ttft_ms,
        "itl": None,
        "e2e": None if first is None else first.e2e_ms,
    }
    subtitles = {"ttft": "time to first token", "itl": "gap between output pieces", "e2e": "whole request"}
    figures = (
        _cdf_chart(f"{_LATENCY_NAMES[key]} distribution", subtitle, report.cdf_ms[key], targets[key])
        for key, subtitle in subtitles.items()
    )
    return trio(*figures)


def _cdf_chart(title: str, subtitle: str, values_ms: Sequence[float], target_ms: float | None) -> str:
    """Share of samples at most as slow, on a logarithmic axis."""
    xs = [max(value, 1e-2) for value in values_ms]  # two tokens in one packet are 0 apart
    markers = () if target_ms is None else (Marker(target_ms, "SLO"),)
    chart = Chart(
        title,
        f"{subtitle}, share at most as long",
        xs,
        [Series("share", "s1", CDF_FRACTIONS[: len(xs)], is_area=True)],
        wording.milliseconds,
        wording.percent,
        x_is_log=True,
        y_max=1.0,
        markers=markers,
        width=charts.SMALL,
    )
    return charts.render(chart)


def _latency_table(report: Report) -> str:
    rows = []
    for key, name in _LATENCY_NAMES.items():
        summary = report.latency_ms[key]
        if summary is not None:
            values = (summary.mean, summary.p50, summary.p90, summary.p95, summary.p99, summary.max)
            rows.append([name, *map(wording.milliseconds, values), str(summary.count)])
    return table(("", "mean", "p50", "p90", "p95", "p99", "max", "samples"), rows) if rows else ""


def _slo_section(report: Report) -> str:
    if not report.classes:
        return ""
    bars = "".join(_class_bars(item) for item in report.classes)
    return section("SLO attainment", f'<div class="card bars">{bars}</div>')


def _class_bars(item: ClassAttainment) -> str:
    parts = [
        _bar(item.slo_class, item.attained_frac, f"{item.attained} of {item.requests}", "s3", is_part=False)
    ]
    singles = (
        ("TTFT", item.slo.ttft_ms, item.ttft_attained_frac),
        ("TPOT", item.slo.tpot_ms, item.tpot_attained_frac),
        ("E2E", item.slo.e2e_ms, item.e2e_attained_frac),
    )
    for name, target_ms, fraction in singles:
        if target_ms is not None and fraction is not None:
            label = f"{name} ≤ {wording.milliseconds(target_ms)}"
            parts.append(_bar(label, fraction, label, "s1", is_part=True))
    return "".join(parts)


def _bar(label: str, fraction: float, hint: str, tone: str, *, is_part: bool) -> str:
    kind = "bar part" if is_part else "bar"
    return (
        f'<div class="{kind} {tone}" title="{escape(hint)}"><span>{escape(label)}</span>'
        f'<div class="track"><div class="fill" style="width:{fraction * 100:.1f}%"></div></div>'
        f'<span class="share">{wording.percent(fraction)}</span></div>'
    )


def _server_section(report: Report) -> str:
    server = report.server
    if server is None or len(server.t_s) < 2:
        return ""
    queue = Chart(
        "Running and waiting",
        "requests inside the server",
        server.t_s,
        [Series("running", "s1", server.running), Series("waiting", "s2", server.waiting)],
        wording.seconds,
        wording.number,
        markers=_warmup_markers(report),
    )
    kv = Chart(
        "KV cache use",
        "share of blocks held by live requests",
        server.t_s,
        [Series("KV use", "s4", server.kv_usage_frac, is_area=True)],
        wording.seconds,
        wording.percent,
        y_max=1.0,
        markers=_warmup_markers(report),
    )
    return section("Server", pair(charts.render(queue), charts.render(kv)))


def _losses_table(report: Report) -> str:
    ranked = sorted(report.requests.errors.items(), key=lambda item: -item[1])
    return table(("error code", "requests"), [[code, str(count)] for code, count in ranked])


def _facts_table(report: Report) -> str:
    return table(None, [list(fact) for fact in facts(report)], kind="facts")


def table(head: Iterable[str] | None, rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are text, and escaped here."""
    parts = []
    if head is not None:
        parts.append("<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>")
    parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="card scroll"><table class="{kind}">{"".join(parts)}</table></div>'
