"""Charts as inline SVG, each a string without anything outside it. Colours are the page's CSS variables."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
MAX_POINTS = 400  # of one line; more cannot be seen
LOG_ABOVE = 40.0  # ratio of the largest to the smallest value from which an axis is logarithmic


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str  # a CSS variable's name


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to pixels, linear from zero or logarithmic."""

    low: float
    high: float
    first_px: float
    last_px: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.first_px + share * (self.last_px - self.first_px), 2)

    def ticks(self) -> list[float]:
        """About five round values; of a logarithmic scale 1, 2 and 5 times powers of ten."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            found = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
            found = [value for value in found if self.low <= value <= self.high]
            return found if len(found) <= 8 else found[:: -(-len(found) // 8)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        count = math.floor((self.high - self.low) / step + 1e-9)
        return [self.low + step * number for number in range(count + 1)]


def scale(values: Sequence[float], first_px: float, last_px: float, *, may_be_log: bool = False) -> Scale:
    """Covers all values."""
    high = max(values, default=0.0)
    positive = [value for value in values if value > 0]
    if may_be_log and positive and high / min(positive) > LOG_ABOVE:
        return Scale(min(positive), high, first_px, last_px, is_log=True)
    return Scale(0.0, high if high > 0 else 1.0, first_px, last_px)


def cdf(values: Sequence[float]) -> list[tuple[float, float]]:
    """Share of values that are at most x, thinned to what can be seen."""
    ordered = sorted(values)
    step = max(len(ordered) // MAX_POINTS, 1)
    places = sorted({*range(0, len(ordered), step), len(ordered) - 1} - {-1})
    return [(ordered[place], (place + 1) / len(ordered)) for place in places]


def lines(title: str, unit: str, series: Sequence[Series], *, is_cdf: bool = False, y_unit: str = "") -> str:
    """A line chart with a legend of its own."""
    xs = [x for one in series for x, _ in one.points]
    across = scale(xs, LEFT, WIDTH - RIGHT, may_be_log=is_cdf)
    ys = [1.0] if is_cdf else [y for one in series for _, y in one.points]
    up = scale(ys, HEIGHT - BOTTOM, TOP)
    below = f"{unit}, logarithmic" if across.is_log else unit
    drawn = [_axes(across, up, below, y_unit or ("share of requests" if is_cdf else ""))]
    for one in series:
        path = " ".join(f"{across(x)},{up(y)}" for x, y in one.points)
        drawn.append(f'<polyline class="line" style="stroke:var(--{one.colour})" points="{path}"/>')
    return _figure(title, _legend([(one.name, one.colour) for one in series]), drawn, HEIGHT)


def bars(title: str, unit: str, counts: Sequence[tuple[str, float]], colour: str) -> str:
    """One bar per label."""
    up = scale([count for _, count in counts], HEIGHT - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / max(len(counts), 1)
    drawn = [_axes(None, up, unit, "requests")]
    for number, (label, count) in enumerate(counts):
        x, y = LEFT + slot * number, up(count)
        middle = f'x="{x + slot / 2:.1f}" y="{HEIGHT - 18}" text-anchor="middle"'
        drawn.append(
            f'<rect x="{x + 2:.1f}" y="{y}" width="{slot - 4:.1f}" height="{HEIGHT - BOTTOM - y:.1f}" '
            f'style="fill:var(--{colour})"><title>{escape(label)}: {count:g}</title></rect>'
            f'<text class="tick" {middle}>{escape(label)}</text>'
        )
    return _figure(title, "", drawn, HEIGHT)


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a waterfall: coloured spans of seconds, and what is said of it."""

    label: str
    spans: Sequence[tuple[float, float, str]]  # from, to, colour


def waterfall(title: str, rows: Sequence[Row], legend: Sequence[tuple[str, str]]) -> str:
    """Requests from top to bottom, time from left to right."""
    thick = 12 if len(rows) <= 60 else 6
    width, height = 2 * WIDTH, thick * len(rows) + TOP + BOTTOM
    across = scale([end for row in rows for _, end, _ in row.spans], LEFT, width - RIGHT)
    drawn = []
    for tick in across.ticks():
        x = across(tick)
        drawn.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        drawn.append(f'<text class="tick" x="{x}" y="{height - 16}" text-anchor="middle">{tick:g} s</text>')
    for number, row in enumerate(rows):
        y = TOP + thick * number
        spans = "".join(
            f'<rect x="{across(begin)}" y="{y + 1}" width="{max(across(end) - across(begin), 0.3):.2f}" '
            f'height="{thick - 2}" style="fill:var(--{colour})"/>'
            for begin, end, colour in row.spans
        )
        drawn.append(f"<g>{spans}<title>{escape(row.label)}</title></g>")
    return _figure(title, _legend(legend), drawn, height, width)


def per_second(moments: Sequence[tuple[float, float]], end_s: float) -> list[tuple[float, float]]:
    """Sums of (time, amount) in a hundred equal bins at most, as rates at the bins' middles."""
    num_bins = max(min(100, math.ceil(end_s / 0.25)), 1)
    width = max(end_s, 1e-9) / num_bins
    sums = [0.0] * num_bins
    for when, amount in moments:
        sums[min(int(when / width), num_bins - 1)] += amount
    return [((number + 0.5) * width, total / width) for number, total in enumerate(sums)]


def in_flight(spans: Sequence[tuple[float, float]], end_s: float) -> list[tuple[float, float]]:
    """How many (from, to) spans are open, at two hundred moments."""
    begins, ends = sorted(begin for begin, _ in spans), sorted(end for _, end in spans)
    moments = [end_s * number / 200 for number in range(201)]
    return [(t, float(bisect.bisect_right(begins, t) - bisect.bisect_right(ends, t))) for t in moments]


def _axes(across: Scale | None, up: Scale, x_unit: str, y_unit: str) -> str:
    parts = []
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
    for tick in across.ticks() if across else ():
        x = across(tick) if across else 0
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 18}" text-anchor="middle">{tick:.4g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="unit" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_unit)}</text>'
    )
    parts.append(
        f'<text class="unit" transform="rotate(-90)" x="{-HEIGHT / 2}" y="11" text-anchor="middle">'
        f"{escape(y_unit)}</text>"
    )
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    marks = (
        f'<span><i style="background:var(--{colour})"></i>{escape(name)}</span>' for name, colour in entries
    )
    return f'<div class="legend">{"".join(marks)}</div>'


def _figure(title: str, legend: str, drawn: Sequence[str], height: float, width: float = WIDTH) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{legend}"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawn)}</svg></figure>"
    )
