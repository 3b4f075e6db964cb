"""What all plots have in common: size, colours, axes. Needs matplotlib, which the `bench` extra brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, WIDE, DPI = (6.4, 4.2), (10.0, 4.2), 150
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#999999")


def require_matplotlib() -> None:
    """Raises `ConfigError` saying what to install."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "plots need matplotlib: pip install 'tandem-serve[bench]', or go without them by --no-plots"
        )


def new_figure(size: tuple[float, float] = SIZE, columns: int = 1) -> tuple[Any, Sequence[Axes]]:
    """A figure and its axes, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def label_axes(axes: Axes, title: str, below: str, beside: str) -> None:
    """A title, what the axes are, and as little else as possible."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def set_log(axes: Axes) -> None:
    """Both axes logarithmic: sizes below by powers of two, times beside in steps of 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Any, file: Path) -> Path:
    """Write the picture; returns the file."""
    figure.savefig(file, dpi=DPI)
    return file
