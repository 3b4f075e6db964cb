"""Steps against context and prefill against length as pictures, each with the limit of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.forward.report import work_of
from bench.forward.results import Results
from bench.plotting import COLORS, label_axes, new_figure, save, set_log


def draw(folder: Path, results: Results) -> Iterator[Path]:
    """Both plots; yields the files."""
    yield _decode(folder / "decode.png", results)
    yield _prefill(folder / "prefill.png", results)


def _decode(file: Path, results: Results) -> Path:
    """Step time over the context of all sequences together, a line per batch; in dashes what memory takes."""
    figure, axes = _figure(f"{results.options.shape}: decode step", "context of all sequences, tokens")
    steps = [timing for timing in results.timings if timing.cell.phase == "decode"]
    for color, batch in zip(COLORS, dict.fromkeys(step.cell.batch for step in steps), strict=False):
        line = [step for step in steps if step.cell.batch == batch]
        totals = [batch * step.cell.tokens for step in line]
        axes.plot(totals, [1e3 * s.seconds.median for s in line], "o-", color=color, label=f"batch {batch}")
        reads = [work_of(step.cell, results.traffic).num_bytes / results.limits.bytes_per_s for step in line]
        axes.plot(totals, [1e3 * seconds for seconds in reads], "--", color=color, linewidth=1)
    return _save(figure, axes, file)


def _prefill(file: Path, results: Results) -> Path:
    """Time of a prompt over its length, and in dashes what the products take."""
    figure, axes = _figure(f"{results.options.shape}: prefill", "prompt, tokens")
    line = [timing for timing in results.timings if timing.cell.phase == "prefill"]
    lengths = [timing.cell.tokens for timing in line]
    axes.plot(lengths, [1e3 * t.seconds.median for t in line], "o-", color=COLORS[0], label="measured")
    products = [work_of(t.cell, results.traffic).num_flops / results.limits.flops for t in line]
    axes.plot(lengths, [1e3 * s for s in products], "--", color=COLORS[0], linewidth=1, label="arithmetic")
    return _save(figure, axes, file)


def _figure(title: str, below: str) -> tuple[Any, Any]:
    """Both axes logarithmic, times in ms."""
    figure, (axes,) = new_figure()
    label_axes(axes, title, below, "ms")
    set_log(axes)
    return figure, axes


def _save(figure: Any, axes: Any, file: Path) -> Path:
    axes.legend(frameon=False)
    return save(figure, file)
