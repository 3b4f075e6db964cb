"""Acceptance and speed-up as pictures. Needs matplotlib, which the `bench` extra brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.plotting import COLORS, WIDE, label_axes, new_figure, require_matplotlib, save
from bench.speculation.cells import TAU, TAU_OFF, K
from bench.speculation.sweep import Row
from tandem.quantizations import AUTO

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEPTHS = ("1", "2", "3", "5", "7", "auto")


def draw(folder: Path, rows: Sequence[Row]) -> Iterator[Path]:
    """Every plot for which there are rows of the default draft, per pair; yields the files."""
    require_matplotlib()
    for pair in dict.fromkeys(row.pair for row in rows):
        ours = [row for row in rows if row.pair == pair and _is_default(row)]
        greedy = [row for row in ours if row.sampling == "greedy"]
        name = pair.replace(", ", "-").replace(" ", "-")
        if ours:
            yield _acceptance(folder / f"acceptance-{name}.png", pair, ours)
        if greedy:
            yield _speedup_by_k(folder / f"speedup-by-k-{name}.png", pair, greedy)
        if any(row.tau != TAU_OFF for row in greedy):
            yield _speedup_by_tau(folder / f"speedup-by-tau-{name}.png", pair, greedy)


def _is_default(row: Row) -> bool:
    """With the draft model as a service has it, and a target that is not quantized."""
    return (row.draft, row.draft_precision, row.target_precision) == ("model", AUTO, "none")


def _acceptance(file: Path, pair: str, rows: Sequence[Row]) -> Path:
    """Against k at batch 1: the share of drafted tokens that is accepted, and how many that are."""
    figure, (left, right) = new_figure(WIDE, 2)
    lines = [
        (f"{sampling}, τ = {tau:g}" if tau != TAU_OFF else sampling, _at(rows, sampling, tau))
        for sampling in ("greedy", "sampled")
        for tau in TAU
    ]
    drawn = [(label, line) for label, line in lines if line]
    for color, (label, line) in zip(COLORS, drawn, strict=False):
        depths = [int(row.k) for row in line]
        left.plot(depths, [100 * row.acceptance_rate for row in line], "o-", color=color, label=label)
        right.plot(depths, [row.mean_accepted_length for row in line], "o-", color=color, label=label)
    for axes, what, unit in ((left, "accepted of drafted", "%"), (right, "accepted per step", "tokens")):
        label_axes(axes, f"{pair}: {what}, batch 1", "draft tokens per step, k", unit)
        axes.set_xticks(K, [str(k) for k in K])
    left.set_ylim(0, 100)
    right.set_ylim(bottom=0)
    left.legend(frameon=False)
    return save(figure, file)


def _at(rows: Sequence[Row], sampling: str, tau: float) -> list[Row]:
    """Constant k at batch 1, in order."""
    kept = [r for r in rows if (r.sampling, r.tau, r.batch) == (sampling, tau, 1) and r.k != "auto"]
    return sorted(kept, key=lambda row: int(row.k))


def _speedup_by_k(file: Path, pair: str, rows: Sequence[Row]) -> Path:
    """One line per batch; k auto beside the constants, what the formula expects in dashes."""
    figure, (axes,) = new_figure()
    for color, batch in zip(COLORS, sorted({row.batch for row in rows}), strict=False):
        line = [row for row in rows if row.batch == batch and row.tau == TAU_OFF]
        constant = sorted((row for row in line if row.k != "auto"), key=lambda row: int(row.k))
        places = [DEPTHS.index(row.k) for row in constant]
        _with_spread(axes, places, constant, color, f"batch {batch}", "o-")
        _with_spread(
            axes, [5.0] * (len(line) - len(constant)), [r for r in line if r.k == "auto"], color, "", "D"
        )
        expected = [row.predicted_speedup or 0.0 for row in constant]
        axes.plot(places, expected, "--", color=color, linewidth=1, alpha=0.6)
    axes.plot([], [], "--", color="#555555", linewidth=1, label="formula")
    axes.set_xticks(range(len(DEPTHS)), DEPTHS)
    label_axes(axes, f"{pair}: greedy, over plain decoding", "draft tokens per step, k", "speed-up")
    _level(axes)
    axes.legend(frameon=False, ncols=2)
    return save(figure, file)


def _speedup_by_tau(file: Path, pair: str, rows: Sequence[Row]) -> Path:
    """One line per k at batch 1."""
    figure, (axes,) = new_figure()
    at_one = [row for row in rows if row.batch == 1]
    varied = [k for k in DEPTHS if len({row.tau for row in at_one if row.k == k}) > 1]
    for color, k in zip(COLORS, varied, strict=False):
        line = sorted((row for row in at_one if row.k == k), key=lambda row: row.tau)
        _with_spread(axes, [TAU.index(row.tau) for row in line], line, color, f"k = {k}", "o-")
    axes.set_xticks(range(len(TAU)), [f"{tau:g}" for tau in TAU])
    label_axes(axes, f"{pair}: greedy, batch 1, over plain decoding", "confidence threshold τ", "speed-up")
    _level(axes)
    axes.legend(frameon=False)
    return save(figure, file)


def _with_spread(
    axes: Axes, places: Sequence[float], rows: Sequence[Row], color: str, label: str, style: str
) -> None:
    """Medians, and bars from the lowest to the highest round."""
    middles = [row.speedup.median for row in rows]
    below = [row.speedup.median - row.speedup.low for row in rows]
    above = [row.speedup.high - row.speedup.median for row in rows]
    axes.errorbar(places, middles, (below, above), fmt=style, color=color, label=label, capsize=3)


def _level(axes: Axes) -> None:
    """The line of plain decoding, and an axis that starts at zero."""
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.set_ylim(bottom=0)
