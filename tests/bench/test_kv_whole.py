"""Whole requests through services that differ in where KV lies."""

from __future__ import annotations

import json

import pytest

from bench import shapes
from bench.kv import whole
from bench.kv.whole import Seen, rows_of, sheet
from tests.bench.test_peers import TINY


def test_rows_by_hand() -> None:
    slow = [{"long": Seen(10.0, 4.0, 40.0)}, {"long": Seen(20.0, 4.0, 40.0)}, {"long": Seen(30.0, 5.0, 40.0)}]
    fast = [{"long": Seen(5.0, 4.0, 30.0)}, {"long": Seen(5.0, 4.0, 20.0)}, {"long": Seen(30.0, 2.0, 10.0)}]
    one, two = rows_of({"memory://": slow, "redis://:secret@host": fast})
    assert (one.ttft_ms.median, one.second_ms.high, one.whole_ratio.median) == (20.0, 5.0, 1.0)
    assert (two.ttft_ratio.low, two.ttft_ratio.median, two.ttft_ratio.high) == (0.25, 0.5, 1.0)
    assert two.whole_ratio.median == 0.5
    assert "secret" not in two.backend
    assert [row[:5] for row in sheet("raw", [one]).rows] == [("long", "memory://", "20", "4", "40")]


@pytest.mark.e2e
@pytest.mark.slow
def test_services_of_both_kinds(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shapes, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(whole, "LOADS", {"8 tokens": (8,), "both": (8, 40)})
    document = whole.run([], "tiny", 2, tmp_path, as_json=False)
    assert [(row["load"], row["backend"]) for row in document["rows"]] == [
        (load, url) for load in ("8 tokens", "both") for url in ("memory://", "shm://")
    ]
    assert all(row["whole_ms"]["low"] > row["ttft_ms"]["low"] > 0 for row in document["rows"])
    assert document == json.loads((tmp_path / "whole.json").read_text())
    assert "ratios to the first backend" in capsys.readouterr().out
