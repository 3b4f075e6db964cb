"""Null workers behind a real router, beside servers that route nothing: every stream ends and is measured."""

import json

import pytest

from bench.streams import run as streams


@pytest.mark.e2e
def test_all_servers_are_measured_by_the_same_streams(tmp_path, capsys):
    # Requests for many ticks of the CPU clock.
    load = streams.Load(streams=4, steps_per_s=20.0, requests=100, seconds=1.0)
    streams.run(load, 1, tmp_path, as_json=False)
    document = json.loads((tmp_path / "streams.json").read_text())
    rows = {row["server"]: row for row in document["rows"]}
    assert set(rows) == {"router", "relay", "plain"}
    for row in rows.values():
        assert row["messages_per_s"] == pytest.approx(80, rel=0.3), "a message for each token"
        assert row["us_per_message"] > 0
        assert row["ms_per_request"] > 0
    assert document["message_ratio"] > 0
    assert "goal" in capsys.readouterr().out
