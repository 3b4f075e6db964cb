"""What the Ray benchmark makes of what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bench.ray_overhead import Visit, overhead, shared_cores
from tandem.config import ClusterConfig


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


def test_both_modes_share_cores_by_one_file(tmp_path):
    option, file = shared_cores(tmp_path)
    assert option == "--config"
    assert ClusterConfig.from_dict(yaml.safe_load(Path(file).read_text())).cores.claims == tmp_path / "claims"
