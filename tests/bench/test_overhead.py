"""The service beside its engine: what is counted, and a run of both."""

from __future__ import annotations

import json

import pytest

from bench import overhead


def test_only_tokens_that_come_while_all_run_count():
    early = [(0.0, 1), (1.0, 2), (2.0, 2), (3.0, 2)]
    late = [(1.0, 1), (2.0, 3), (3.0, 3), (4.0, 3), (5.0, 9)]
    assert overhead.steady_rate([early, late]) == (2 + 2 + 3 + 3) / 2
    assert overhead.steady_rate([early]) == 2
    assert overhead.steady_rate([early, [(4.0, 1), (5.0, 1)]]) == 0


def test_a_gap_is_between_messages_of_one_sequence():
    early, late = [(0.0, 1), (1.0, 2), (4.0, 2)], [(0.5, 1), (2.5, 3)]
    assert overhead.gaps_ms([early, late]) == [1000, 2000, 3000]


def test_a_row_keeps_the_rounds_together():
    seen = [overhead.Seen(rate, ttft, 5.0, 9.0) for rate, ttft in ((50.0, 30.0), (80.0, 10.0), (90.0, 20.0))]
    row = overhead.Row.of(2, [100.0, 100.0, 90.0], seen)
    assert (row.ratio.low, row.ratio.median, row.ratio.high) == (0.5, 0.8, 1.0)
    assert (row.ttft_ms.median, row.gap_ms.median, row.gap_p99_ms.high) == (20, 5, 9)
    assert overhead.sheet("raw", [row]).rows[0][-2:] == ("20", "5.0, 9.0")


@pytest.mark.long
def test_engine_and_service_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "BATCHES", (1, 2))
    document = overhead.run("raw", 1, tmp_path, as_json=True)
    assert [row["batch"] for row in document["rows"]] == [1, 2]
    for row in document["rows"]:
        assert row["ratio"]["median"] == row["service"]["median"] / row["engine"]["median"]
        assert row["ratio"]["median"] > 0
        assert row["ttft_ms"]["median"] > 0
        assert 0 < row["gap_ms"]["median"] <= row["gap_p99_ms"]["median"]
    assert json.loads((tmp_path / "overhead.json").read_text()) == document
    assert (tmp_path / "overhead.csv").exists()
