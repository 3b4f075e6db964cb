"""What plots have in common."""

from __future__ import annotations

from itertools import combinations

import pytest

pytest.importorskip("matplotlib")

from bench.plotting import new_figure, set_log


@pytest.mark.parametrize(("low", "high"), [(0.2, 5e3), (1.0, 400.0), (10.0, 20.0)])
def test_no_two_labels_of_a_logarithmic_axis_touch(low: float, high: float) -> None:
    figure, (axes,) = new_figure()
    set_log(axes)
    axes.plot([1, 4096], [low, high])
    figure.canvas.draw()
    for axis in (axes.xaxis, axes.yaxis):
        first, last = axis.get_view_interval()
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        labels = [tick.label1 for tick in ticks if first <= tick.get_loc() <= last]
        inside = [label.get_window_extent() for label in labels if label.get_text()]
        assert len(inside) >= 2
        assert not any(a.overlaps(b) for a, b in combinations(inside, 2))
