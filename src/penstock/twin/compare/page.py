"""`compare.html`: one self-contained page. Pure: a `Comparison` in, text out; foreign names are escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from penstock.twin.compare.document import Comparison
from penstock.twin.compare.pairs import Group
from penstock.twin.compare.run import Run
from penstock.twin.sampling import resampled
from penstock.workloads import charts, report_html, wording
from penstock.workloads.charts import Chart, Series
from penstock.workloads.report import CDF_FRACTIONS

TONES = ("s1", "s2", "s3", "s4", "s5", "s6")
POINTS = 200
_SMALLEST_MS = 1e-2


def render(comparison: Comparison) -> str:
    """The whole page."""
    body = "".join(
        (
            _header(comparison),
            report_html.section("To saturation", *_sweep_charts(comparison)),
            report_html.section(f"Over time, at {comparison.focus:.3g}× the trace's rate", _time(comparison)),
            report_html.section(f"Distributions, at {comparison.focus:.3g}×", _distributions(comparison)),
            _changes(comparison),
            report_html.section("All runs", _runs_table(comparison)),
            report_html.section("Tenants", _tenants_table(comparison)) if _has_tenants(comparison) else "",
            report_html.section("How this was made", _facts_table(comparison)),
        )
    )
    return report_html.page(f"{comparison.title} - penstock compare", body)


def _header(comparison: Comparison) -> str:
    notes = "".join(f'<div class="card note">{escape(text)}</div>' for text in comparison.notes)
    names = " · ".join(comparison.compared)
    return (
        f'<header><div class="kind">Penstock compare</div><h1>{escape(comparison.title)}</h1>'
        f"<p>{escape(names)}</p></header>{notes}"
    )


def _lines(comparison: Comparison, value: Callable[[Run], float | None]) -> list[Series]:
    """One line a stack, over the rates."""
    return [
        Series(name, tone, [value(run) for run in comparison.of_stack(name)])
        for name, tone in zip(comparison.compared, TONES, strict=False)
    ]


def _sweep_charts(comparison: Comparison) -> list[str]:
    def chart(
        title: str,
        subtitle: str,
        value: Callable[[Run], float | None],
        format_y: Callable[[float], str],
        is_log: bool = False,
        y_max: float | None = None,
    ) -> str:
        return charts.render(
            Chart(
                title,
                f"{subtitle}; rate as a multiple of the trace's own",
                comparison.rates,
                _lines(comparison, value),
                _times,
                format_y,
                x_is_log=True,
                y_is_log=is_log,
                y_max=y_max,
            )
        )

    latencies = [
        chart(
            f"{name.upper()} {which}",
            "answered requests",
            lambda run, name=name, which=which: _latency(run, name, which),  # type: ignore[misc]
            wording.milliseconds,
            is_log=True,
        )
        for name in ("ttft", "tpot")
        for which in ("p50", "p99")
    ]
    served = [
        chart(
            "E2E p99",
            "answered requests",
            lambda run: _latency(run, "e2e", "p99"),
            wording.milliseconds,
            is_log=True,
        ),
        chart("Goodput", "requests per second within their SLO", _goodput, wording.number),
        chart("Within the SLO", "share of requests", _attained, wording.percent, y_max=1.0),
        chart("Preemptions", "over the run", lambda run: float(run.preemptions), wording.number),
        chart("Fairness", "Jain's index of the tenants' served shares", _jain, wording.number, y_max=1.0),
        chart("KV use", "largest share of blocks in use", lambda run: run.kv_usage_max, wording.percent),
    ]
    figures = [*latencies, *(served if _has_tenants(comparison) else served[:4])]
    return [report_html.pair(*figures[index : index + 2]) for index in range(0, len(figures), 2)]


def _times(rate: float) -> str:
    return f"{rate:.3g}×"


def _latency(run: Run, name: str, which: str) -> float | None:
    summary = run.latency_ms[name]
    return None if summary is None else max(_SMALLEST_MS, float(getattr(summary, which)))


def _goodput(run: Run) -> float:
    return run.goodput.goodput_rps


def _attained(run: Run) -> float:
    return run.goodput.attained_frac


def _jain(run: Run) -> float | None:
    return run.fairness.served_frac_jain


def _has_tenants(comparison: Comparison) -> bool:
    return any(run.fairness.tenants > 1 for run in comparison.runs)


def _time(comparison: Comparison) -> str:
    runs = comparison.at_focus()
    grid = np.linspace(0.0, max(run.server.t_s[-1] for run in runs), POINTS)

    def chart(
        title: str,
        subtitle: str,
        of: Callable[[Run], Sequence[float | None]],
        format_y: Callable[[float], str],
    ) -> str:
        series = [
            Series(run.stack, tone, resampled(run.server.t_s, of(run), grid).tolist())
            for run, tone in zip(runs, TONES, strict=False)
        ]
        return charts.render(
            Chart(title, subtitle, grid.tolist(), series, wording.seconds, format_y, width=charts.SMALL)
        )

    trio = (
        chart("Waiting", "requests in the queue", lambda run: run.server.waiting, wording.number),
        chart("Running", "requests in the batch", lambda run: run.server.running, wording.number),
        chart(
            "KV use",
            "share of blocks held by live requests",
            lambda run: run.server.kv_usage_frac,
            wording.percent,
        ),
    )
    return report_html.trio(*trio)


def _distributions(comparison: Comparison) -> str:
    return report_html.trio(*(_cdf_chart(comparison, name) for name in ("ttft", "tpot", "e2e")))


def _cdf_chart(comparison: Comparison, name: str) -> str:
    """Share of requests at most as slow, of all stacks over one logarithmic axis."""
    runs = [run for run in comparison.at_focus() if run.cdf_ms[name]]
    quantiles = [np.maximum(np.array(run.cdf_ms[name]), _SMALLEST_MS) for run in runs]
    low = min((float(values[0]) for values in quantiles), default=1.0)
    high = max((float(values[-1]) for values in quantiles), default=1.0)
    grid = np.geomspace(low, max(high, low * 1.01), POINTS)
    series = [
        Series(
            run.stack,
            TONES[comparison.compared.index(run.stack)],
            np.interp(np.log(grid), np.log(values), CDF_FRACTIONS, left=0.0, right=1.0).tolist(),
        )
        for run, values in zip(runs, quantiles, strict=True)
    ]
    return charts.render(
        Chart(
            name.upper(),
            "share of requests at most as long",
            grid.tolist() if runs else [],
            series,
            wording.milliseconds,
            wording.percent,
            x_is_log=True,
            y_max=1.0,
            width=charts.SMALL,
        )
    )


def _changes(comparison: Comparison) -> str:
    runs = [run for run in comparison.at_focus() if run.against_first]
    if not runs:
        return ""
    first = comparison.compared[0]
    title = f"Who gains, who loses: each request against {first}, at {comparison.focus:.3g}×"
    cards = []
    for run in runs:
        bars = "".join(_change_bar(group) for group in run.against_first)
        cards.append(f'<div class="card bars"><h3>{escape(run.stack)}</h3>{bars}</div>')
    legend = (
        '<div class="legend"><span class="key gained">faster by more than 5 %</span>'
        '<span class="key lost">slower by more than 5 %</span></div>'
    )
    return report_html.section(title, legend, *cards)


def _change_bar(group: Group) -> str:
    gained, lost = group.gained / group.requests, group.lost / group.requests
    kind = "" if group.kind == "all" else f"{group.kind} "
    ratio = "" if group.e2e_ratio_p50 is None else f", E2E × {group.e2e_ratio_p50:.2f}"
    hint = f"{group.requests} requests; SLO newly met {group.slo_gained}, newly missed {group.slo_lost}"
    return (
        f'<div class="bar wide" title="{escape(hint)}"><span>{escape(kind + group.name)}</span>'
        f'<div class="track parts"><div class="fill gained" style="width:{gained * 100:.1f}%"></div>'
        f'<div class="fill lost" style="width:{lost * 100:.1f}%"></div></div>'
        f'<span class="share">+{wording.percent(gained)} −{wording.percent(lost)}{ratio}</span></div>'
    )


def _runs_table(comparison: Comparison) -> str:
    head = (
        "rate", "stack", "req/s", "TTFT p50", "p99", "TPOT p50", "p99", "E2E p50", "p99", "goodput",
        "within SLO", "preempted", "KV mean", "KV max",
    )  # fmt: skip
    rows = []
    for run in comparison.runs:
        latencies = [
            _latency(run, name, which) for name in ("ttft", "tpot", "e2e") for which in ("p50", "p99")
        ]
        rows.append(
            [
                f"{run.rate:.3g}×",
                run.stack,
                "-" if run.requested_rps is None else wording.number(run.requested_rps),
                *("-" if value is None else wording.milliseconds(value) for value in latencies),
                f"{wording.number(run.goodput.goodput_rps)}/s",
                wording.percent(run.goodput.attained_frac),
                str(run.preemptions),
                wording.percent(run.kv_usage_mean),
                wording.percent(run.kv_usage_max),
            ]
        )
    return report_html.table(head, rows)


def _tenants_table(comparison: Comparison) -> str:
    """Service at the focus rate: tokens delivered before the last arrival, of what was asked for."""
    rows = []
    for run in comparison.at_focus():
        fair = run.fairness
        jain = "-" if fair.tokens_jain is None else f"{fair.tokens_jain:.3f}"
        spread = "-" if fair.tokens_max_over_min is None else f"{fair.tokens_max_over_min:.3g}"
        due = "-" if fair.due_frac_min is None else wording.percent(fair.due_frac_min)
        told = f"Jain {jain}, max/min {spread}, at least {due} of what was due"
        rows.append([run.stack, f"all {fair.tenants}", "", "", told])
        rows += [
            [
                "",
                service.tenant,
                str(service.requests),
                wording.number(service.service_tokens),
                f"{wording.percent(service.served_frac)} of what it asked for",
            ]
            for service in fair.largest[:10]
        ]
    return report_html.table(("stack", "tenant", "requests", "tokens", "served"), rows)


def _facts_table(comparison: Comparison) -> str:
    known = comparison.configuration.items()
    rows = [[key.replace("_", " "), str(value)] for key, value in known if value is not None]
    for stack in comparison.stacks:
        limits = stack.limits
        sizes = f"{limits.kv_blocks} KV blocks, {limits.step_tokens_max} tokens a step"
        rows.append([f"stack {stack.name}", f"{sizes}, up to {limits.running_max} at once"])
    return report_html.table(None, rows, kind="facts")
