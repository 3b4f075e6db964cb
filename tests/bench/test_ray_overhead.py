"""What the Ray benchmark makes of what it measured."""

from __future__ import annotations

import pytest

from bench.ray_overhead import Visit, overhead


def test_figures_are_taken_within_rounds():
    """A machine twice as slow in the second round changes no ratio."""
    visits = {
        "embedded": [Visit(5, 100, 10), Visit(5, 50, 20)],
        "ray": [Visit(20, 98, 11), Visit(20, 49, 23)],
    }
    found = overhead(visits)
    assert (found.throughput_ratio.low, found.throughput_ratio.high) == (0.98, 0.98)
    assert (found.added_ttft_ms.low, found.added_ttft_ms.median, found.added_ttft_ms.high) == (1, 2, 3)


def test_a_round_without_its_pair_is_no_result():
    with pytest.raises(ValueError, match="longer"):
        overhead({"embedded": [Visit(5, 100, 10), Visit(5, 50, 20)], "ray": [Visit(20, 98, 11)]})
