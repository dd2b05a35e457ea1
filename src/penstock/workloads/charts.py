"""Line charts as inline SVG, hand-made so that a report is one small file that works offline.

Everything that is drawn is escaped here. A chart carries its points as JSON for the tooltip script in
`report_style`; without scripts it is still readable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from penstock.workloads.report_style import DRAWING, PALETTE

HEIGHT = 230
SMALL, MEDIUM, WIDE = 372, 560, 1140  # of a third, a half and the whole of the page: text keeps its size
_SMALLEST = 1e-9  # a picture of values below it is a flat line at 0
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 20, 28
HEAD = 66  # of a picture of its own: title, subtitle, legend
_OWN_STYLE = """
text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
svg .title { font-size: 14px; font-weight: 600; fill: var(--ink); }
svg .note { font-size: 12px; } svg .key { font-size: 12px; fill: var(--soft); }
.card { fill: var(--card); stroke: var(--rule); } .swatch { fill: var(--tone); }
"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `tone` is a CSS class of `report_style`; None in `ys` is a gap."""

    name: str
    tone: str
    ys: Sequence[float | None]
    is_area: bool = False


@dataclass(frozen=True, slots=True)
class Marker:
    """A labelled vertical line, for an SLO or the end of the warm-up."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over shared, ascending `xs`. A logarithmic axis needs positive values."""

    title: str
    subtitle: str
    xs: Sequence[float]
    series: Sequence[Series]
    format_x: Callable[[float], str]
    format_y: Callable[[float], str]
    x_is_log: bool = False
    y_max: float | None = None
    markers: Sequence[Marker] = ()
    width: int = MEDIUM
    y_is_log: bool = False


def render(chart: Chart) -> str:
    """One `<figure>`. Pure."""
    values = [y for series in chart.series for y in series.ys if y is not None]
    if len(chart.xs) < 2 or not values:
        return _empty(chart)
    axes = _Axes.of(chart, min(values), max(values))
    parts = [
        f'<svg viewBox="0 0 {chart.width} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">',
        _grid(chart, axes),
        *(_line(chart.xs, series, axes) for series in chart.series),
        *(_marker(marker, axes) for marker in chart.markers),
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>',
    ]
    return _figure(chart, "".join(parts) + _tooltip_data(chart, axes))


def standalone(chart: Chart) -> str:
    """One SVG document, for a page that shows files: title and legend inside, its own light and dark colours.

    Pure. A chart without values says so.
    """
    values = [y for series in chart.series for y in series.ys if y is not None]
    height = HEIGHT + HEAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {height}" role="img" '
        f'width="{chart.width}" height="{height}" aria-label="{escape(chart.title)}">',
        f"<style>{PALETTE}{DRAWING}{_OWN_STYLE}</style>",
        f'<rect class="card" width="{chart.width}" height="{height}" rx="10"/>',
        f'<text class="title" x="16" y="24">{escape(chart.title)}</text>',
        f'<text class="note" x="16" y="42">{escape(chart.subtitle)}</text>',
    ]
    if len(chart.series) > 1:
        parts.append(_keys(chart.series))
    parts.append(f'<g transform="translate(0 {HEAD})">')
    if len(chart.xs) < 2 or not values:
        parts.append(f'<text class="note" x="16" y="{HEIGHT // 2}">no data</text>')
    else:
        axes = _Axes.of(chart, min(values), max(values))
        parts.append(_grid(chart, axes))
        parts += [_line(chart.xs, series, axes) for series in chart.series]
        parts += [_marker(marker, axes) for marker in chart.markers]
    return "\n".join([*parts, "</g></svg>", ""])


def _keys(series: Sequence[Series]) -> str:
    """The legend; a letter is taken for 6.4 pixels."""
    parts, x = [], 16.0
    for item in series:
        parts.append(f'<rect class="swatch {item.tone}" x="{x:.0f}" y="52" width="10" height="10" rx="3"/>')
        parts.append(f'<text class="key" x="{x + 16:.0f}" y="61">{escape(item.name)}</text>')
        x += 16 + 6.4 * len(item.name) + 18
    return "".join(parts)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten (and 2 and 5 times them, where few) from at or below `low` to at or above `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max((tick for tick in ticks if tick <= low * 1.0001), default=ticks[0])
    last = min((tick for tick in ticks if tick >= high * 0.9999), default=ticks[-1])
    return [tick for tick in ticks if first <= tick <= last]


def nice_ticks(high: float, count: int = 4) -> list[float]:
    """0 and about `count` round steps up to or just past `high`, which is positive."""
    rough = high / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class _Axes:
    x_low: float
    x_high: float
    x_is_log: bool
    width: int
    y_ticks: tuple[float, ...]
    y_is_log: bool = False

    @classmethod
    def of(cls, chart: Chart, y_low: float, y_high: float) -> _Axes:
        high = chart.y_max or (y_high if y_high > _SMALLEST else 1.0)
        ends = [chart.xs[0], chart.xs[-1]]
        if chart.x_is_log:
            ends += [marker.x for marker in chart.markers if marker.x > 0]
        else:
            ends.append(0.0)  # time axes begin with the run
        low_x, high_x = min(ends), max(ends)
        if low_x == high_x:
            high_x = low_x * 1.1 if chart.x_is_log else low_x + 1
        ticks = log_ticks(max(y_low, _SMALLEST), high * 1.01) if chart.y_is_log else nice_ticks(high)
        return cls(low_x, high_x, chart.x_is_log, chart.width, tuple(ticks), chart.y_is_log)

    def px(self, x: float) -> float:
        if self.x_is_log:
            share = math.log(x / self.x_low) / math.log(self.x_high / self.x_low)
        else:
            share = (x - self.x_low) / (self.x_high - self.x_low)
        return LEFT + min(1.0, max(0.0, share)) * (self.width - LEFT - RIGHT)

    def py(self, y: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        share = math.log(max(y, low) / low) / math.log(high / low) if self.y_is_log else y / high
        return HEIGHT - BOTTOM - min(1.0, share) * (HEIGHT - TOP - BOTTOM)

    def x_ticks(self) -> list[float]:
        if not self.x_is_log:
            ticks = nice_ticks(self.x_high - self.x_low, 5)
            return [self.x_low + tick for tick in ticks if self.x_low + tick <= self.x_high * 1.0001]
        powers = range(math.floor(math.log10(self.x_low)), math.ceil(math.log10(self.x_high)) + 1)
        factors = (1, 2, 5) if len(powers) <= 4 else (1,)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        return [tick for tick in ticks if self.x_low <= tick <= self.x_high]


def _figure(chart: Chart, body: str) -> str:
    legend = ""
    if len(chart.series) > 1:
        keys = (f'<span class="key {item.tone}">{escape(item.name)}</span>' for item in chart.series)
        legend = f'<div class="legend">{"".join(keys)}</div>'
    head = f"<h3>{escape(chart.title)}</h3><p>{escape(chart.subtitle)}</p>"
    return f'<figure class="card chart"><figcaption>{head}{legend}</figcaption>{body}</figure>'


def _empty(chart: Chart) -> str:
    return _figure(chart, '<div class="none">no data</div>')


def _grid(chart: Chart, axes: _Axes) -> str:
    parts = []
    for y in axes.y_ticks:
        at = axes.py(y)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        label = escape(chart.format_y(y))
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{label}</text>')
    last_px = -math.inf
    for x in axes.x_ticks():
        at = axes.px(x)
        if at - last_px < 44:  # labels would touch
            continue
        last_px = at
        label = escape(chart.format_x(x))
        anchor = "end" if at > chart.width - 30 else "middle"
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 9}" text-anchor="{anchor}">{label}</text>'
        )
    return "".join(parts)


def _line(xs: Sequence[float], series: Series, axes: _Axes) -> str:
    runs: list[list[str]] = [[]]
    for x, y in zip(xs, series.ys, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append(f"{axes.px(x):.1f},{axes.py(y):.1f}")
    parts = []
    for run in filter(None, runs):
        if len(run) == 1:
            cx, cy = run[0].split(",")
            parts.append(f'<circle class="dot {series.tone}" cx="{cx}" cy="{cy}" r="2"/>')
            continue
        if series.is_area:
            floor = f"{HEIGHT - BOTTOM}"
            first, last = run[0].split(",")[0], run[-1].split(",")[0]
            points = " ".join([f"{first},{floor}", *run, f"{last},{floor}"])
            parts.append(f'<polygon class="area {series.tone}" points="{points}"/>')
        parts.append(f'<polyline class="line {series.tone}" points="{" ".join(run)}"/>')
    return "".join(parts)


def _marker(marker: Marker, axes: _Axes) -> str:
    at = axes.px(marker.x)
    anchor, shift = ("end", -5) if at > axes.width * 0.6 else ("start", 5)
    return (
        f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="mark" x="{at + shift:.1f}" y="{TOP - 7}" text-anchor="{anchor}">'
        f"{escape(marker.label)}</text>"
    )


def _tooltip_data(chart: Chart, axes: _Axes) -> str:
    """What the script shows: pixel of each x, its label, and per series the pixel and text of each y."""
    data = {
        "x": [round(axes.px(x), 1) for x in chart.xs],
        "label": [chart.format_x(x) for x in chart.xs],
        "series": [
            {
                "name": series.name,
                "tone": series.tone,
                "y": [None if y is None else round(axes.py(y), 1) for y in series.ys],
                "text": ["-" if y is None else chart.format_y(y) for y in series.ys],
            }
            for series in chart.series
        ],
    }
    return f'<script type="application/json">{embedded_json(data)}</script>'


def embedded_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
