"""Charts as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.eval.experiment import Chart, Series
from bench.plotting import COLORS, label_axes, new_figure, save, set_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS_SHARE = 0.8  # of the room of one place
GREY = "#777777"
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # where a line crosses a figure
WORD_WIDTH = 13  # letters under a bar
SMALL, SMALLEST = 8, 6  # points of letters
MANY = 4  # bars side by side


def draw(folder: Path, stem: str, charts: Sequence[Chart]) -> Iterator[Path]:
    """One file per chart that has anything to show; yields the files."""
    for chart in charts:
        if any(series.values for series in chart.series):
            yield _draw(folder / f"{stem}-{chart.name}.png", chart)


def _draw(file: Path, chart: Chart) -> Path:
    figure, (axes,) = new_figure()
    words = list(dict.fromkeys(p for series in chart.series for p in series.places if isinstance(p, str)))
    seen = {True: 0, False: 0}  # of what is expected and of what was measured: pairs share a colour
    for number, series in enumerate(chart.series):
        places = [words.index(place) if isinstance(place, str) else place for place in series.places]
        if chart.is_bars:
            _bars(axes, series, places, number, len(chart.series))
        else:
            _line(axes, series, places, seen[series.is_expected])
        seen[series.is_expected] += 1
    if words:
        axes.set_xticks(range(len(words)), [textwrap.fill(word, WORD_WIDTH) for word in words])
    else:
        axes.set_xticks(sorted({place for series in chart.series for place in series.places}))
    label_axes(axes, chart.title, chart.below, chart.beside)
    _scale(axes, chart)
    axes.legend(frameon=False, fontsize=SMALL, ncols=2 if len(chart.series) > 3 else 1)
    return save(figure, file)


def _line(axes: Axes, series: Series, places: Sequence[float], number: int) -> None:
    color = COLORS[number % len(COLORS)]
    if series.is_expected:
        axes.plot(places, series.values, "x--", color=color, label=series.name, linewidth=1, alpha=0.7)
    else:
        axes.plot(places, series.values, "o-", color=color, label=series.name)


def _bars(axes: Axes, series: Series, places: Sequence[float], number: int, count: int) -> None:
    width = BARS_SHARE / count
    lefts = [place - BARS_SHARE / 2 + (number + 0.5) * width for place in places]
    color = GREY if series.is_expected else COLORS[number % len(COLORS)]
    bars = axes.bar(lefts, series.values, width, color=color, label=series.name)
    axes.bar_label(bars, fmt="%.2f", fontsize=SMALL if count < MANY else SMALLEST, padding=2, bbox=BACKGROUND)


def _scale(axes: Axes, chart: Chart) -> None:
    if chart.level is not None:
        axes.axhline(chart.level, color="#333333", linewidth=0.8)
    if chart.is_log:
        set_log(axes)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(0, high + 0.15 * (high - low))  # room for the legend
