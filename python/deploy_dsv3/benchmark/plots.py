"""The report's pictures as SVG, drawn once for a wide page and once for a narrow one.

A page shows the one that fits, so that text keeps its size on a telephone. Colours come from the page's style
(classes), so both colour schemes work. A plotting library would bring tens of megabytes for three pictures,
and its SVG scales text down with the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from deploy_dsv3.benchmark.display import duration

WIDE, NARROW = 920, 350

_MOST_POINTS = 160


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row's output throughput [tokens/s] beside the published one; None: not there."""

    label: str
    measured: float | None
    published: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """Percentiles of one latency of one row [ms]."""

    label: str
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a row went over time."""

    label: str
    rates: Sequence[float]
    """Tokens/s in each bin."""
    bin_s: float
    mean: float
    published: float | None


def throughput(bars: Sequence[Bar], width: int) -> str:
    """Two bars a row: published above, measured below."""
    narrow = width < 500
    left, right, bar, gap = (0 if narrow else 90), 150, 14, 5
    top, group = 6, (2 * bar + gap + (42 if narrow else 22))
    most = max((value for each in bars for value in (each.measured, each.published) if value), default=1.0)
    scale = (width - left - right) / most
    parts = []
    for place, each in enumerate(bars):
        y = top + place * group
        if narrow:
            parts.append(_text(0, y + 12, each.label, "label"))
            y += 20
        else:
            parts.append(_text(left - 12, y + bar + gap / 2 + 4, each.label, "label end"))
        for value, kind, name in (
            (each.published, "published", "published"),
            (each.measured, "measured", ""),
        ):
            shown = f"{_number(value)} {name}".strip() if value else ""
            if kind == "measured":
                shown = f"{_number(value)} tok/s" if value else each.note or "not measured"
                shown += f" ({_share(each)})" if _share(each) else ""
            length = (value or 0) * scale
            if value:
                parts.append(_rect(left, y, max(length, 1), bar, kind))
            if value or kind == "measured":
                parts.append(_text(left + length + 7, y + bar - 3, shown, f"value {kind}-text"))
            y += bar + gap
    height = top + len(bars) * group
    return _svg("throughput", width, height, parts, "Output throughput of each row, published and measured")


def latencies(panels: Sequence[tuple[str, Sequence[LatencyRow]]], width: int) -> str:
    """A panel for each latency: median, 90th and 99th percentile of each row on a logarithmic axis."""
    columns = 1 if width < 500 else 2
    gutter, head, line, foot = 40, 26, 22, 30
    panel_width = (width - gutter * (columns - 1)) / columns
    rows = max((len(values) for _, values in panels), default=0)
    panel_height = head + rows * line + foot + 12
    parts = []
    for place, (title, values) in enumerate(panels):
        x, y = (place % columns) * (panel_width + gutter), (place // columns) * panel_height
        parts.append(_text(x, y + 14, title, "title"))
        if values:
            parts += _latency_panel(values, x, y + head, panel_width, line)
        else:
            parts.append(_text(x, y + head + 16, "nothing measured", "value"))
    height = math.ceil(len(panels) / columns) * panel_height
    return _svg("latency", width, height, parts, "Latency percentiles of each row")


def courses(rows: Sequence[Course], width: int) -> str:
    """A panel for each row: tokens a second over the row's time."""
    columns = 1 if width < 500 else 3 if len(rows) > 2 else max(len(rows), 1)
    gutter, head, plot, foot = 34, 24, 92, 34
    panel_width = (width - gutter * (columns - 1)) / columns
    panel_height = head + plot + foot
    parts = []
    for place, row in enumerate(rows):
        x, y = (place % columns) * (panel_width + gutter), (place // columns) * panel_height
        parts.append(_text(x, y + 13, row.label, "title"))
        parts += _course_panel(row, x, y + head, panel_width, plot)
    height = math.ceil(len(rows) / columns) * panel_height
    return _svg("course", width, height, parts, "Output throughput over time of each row")


def _latency_panel(values: Sequence[LatencyRow], x: float, y: float, width: float, line: float) -> list[str]:
    label = 74
    numbers = [n for value in values for n in (value.p50, value.p90, value.p99) if n > 0]
    if not numbers:
        return [_text(x, y + 16, "below the clock's resolution", "value")]
    inner = width - label - 12
    ticks = _log_ticks(min(numbers), max(numbers), most=6 if inner > 250 else 4)
    low, high = ticks[0], ticks[-1]

    def at(number: float) -> float:
        inside = min(max(number, low), high)
        return x + label + inner * math.log(inside / low) / math.log(high / low)

    bottom = y + len(values) * line + 4
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{y:.1f}" y2="{bottom:.1f}"/>')
        edge = " end" if tick == ticks[-1] and at(tick) > x + width - 20 else " middle"
        parts.append(_text(at(tick), bottom + 15, _milliseconds(tick), f"tick{edge}"))
    for place, value in enumerate(values):
        middle = y + place * line + line / 2 + 2
        parts.append(_text(x, middle + 4, value.label, "label"))
        parts.append(
            f'<line class="range" x1="{at(value.p50):.1f}" x2="{at(value.p99):.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
        )
        told = (
            f"{value.label}: median {_milliseconds(value.p50)}, p90 {_milliseconds(value.p90)}, "
            f"p99 {_milliseconds(value.p99)}"
        )
        for number, kind, radius in ((value.p99, "p99", 4.5), (value.p90, "p90", 3.5), (value.p50, "p50", 5)):
            parts.append(
                f'<circle class="{kind}" cx="{at(number):.1f}" cy="{middle:.1f}" r="{radius}">'
                f"<title>{escape(told)}</title></circle>"
            )
    return parts


def _course_panel(row: Course, x: float, y: float, width: float, height: float) -> list[str]:
    rates, bin_s = _thinned(row.rates, row.bin_s)
    if not rates:
        return [_text(x, y + 16, "nothing measured", "value")]
    most = max(*rates, row.mean, row.published or 0.0) * 1.08 or 1.0
    step = width / len(rates)

    def level(rate: float) -> float:
        return y + height * (1 - rate / most)

    points = [(x + step * (place + 0.5), level(rate)) for place, rate in enumerate(rates)]
    first, last = points[0], points[-1]
    curve = " L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    base = y + height
    parts = [
        f'<path class="area" d="M{first[0]:.1f} {base:.1f} L{curve} L{last[0]:.1f} {base:.1f} Z"/>',
        f'<path class="curve" d="M{curve}"/>',
        f'<line class="axis" x1="{x:.1f}" x2="{x + width:.1f}" y1="{base:.1f}" y2="{base:.1f}"/>',
    ]
    if row.published:
        at = level(row.published)
        parts.append(f'<line class="published-line" x1="{x:.1f}" x2="{x + width:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(x + width, at - 4, f"published {_number(row.published)}", "tick end published-text"))
    parts.append(_text(x, base + 15, f"mean {_number(row.mean)} tok/s", "tick measured-text"))
    parts.append(_text(x + width, base + 15, duration(bin_s * len(rates)), "tick end"))
    return parts


def _thinned(rates: Sequence[float], bin_s: float) -> tuple[list[float], float]:
    """At most `_MOST_POINTS` points, each the mean of the bins behind it."""
    together = max(1, math.ceil(len(rates) / _MOST_POINTS))
    parts = [rates[place : place + together] for place in range(0, len(rates), together)]
    return [sum(part) / len(part) for part in parts], bin_s * together


def _log_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers around a range, `most` at most: 1, 2 and 5 of each power of ten, or powers alone."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 2, 5), (1,)):
        marks = [step * 10.0**power for power in powers for step in steps]
        first = max(place for place, mark in enumerate(marks) if mark <= low * 1.0001)
        last = min(place for place, mark in enumerate(marks) if mark >= high * 0.9999)
        ticks = marks[first : max(last, first + 1) + 1]
        if len(ticks) <= most:
            break
    apart = math.ceil((len(ticks) - 1) / (most - 1))
    # The last one ends the axis, whatever is left out between.
    return [*ticks[:-1:apart], ticks[-1]]


def _share(bar: Bar) -> str:
    return f"{100 * bar.measured / bar.published:.0f} %" if bar.measured and bar.published else ""


def _milliseconds(value: float) -> str:
    if value >= 100_000:
        return f"{value / 1000:,.0f} s"
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms" if value >= 0.1 else f"{1000 * value:.3g} µs"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="3"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(name: str, width: int, height: float, parts: Sequence[str], told: str) -> str:
    size = "narrow" if width < 500 else "wide"
    return (
        f'<svg class="plot {name} {size}" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-label="{escape(told)}">{"".join(parts)}</svg>'
    )


def rates(timeline: dict[str, Any]) -> list[float]:
    """Tokens/s in each bin of a row's timeline; the last bin is left out, as it is not full."""
    events = timeline["events"]
    return [count / timeline["bin_s"] for count in (events[:-1] if len(events) > 1 else events)]
