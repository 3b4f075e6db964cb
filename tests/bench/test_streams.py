"""Null workers behind a real router, beside servers that route nothing: every stream ends and is measured."""

import json

import pytest

from bench.streams import run as streams
from bench.streams.clients import PROMPT_TOKENS
from tandem.config import ModelConfig
from tandem.geometry import ModelGeometry


@pytest.mark.parametrize("count", [1, 50, 80, 200, 2000, 10_000])
def test_a_long_stream_is_one_the_model_may_answer(count):
    load, most = streams.Load.of(count), ModelGeometry.from_path(ModelConfig().path).max_context
    assert 8 * load.steps_per_s <= load.long_tokens <= most - PROMPT_TOKENS


@pytest.mark.e2e
def test_all_servers_are_measured_by_the_same_streams(tmp_path, capfd):
    load = streams.Load(streams=4, steps_per_s=20.0, requests=20, seconds=1.0)
    for _ in range(3):  # others may use this machine too
        document = streams.run(load, 1, tmp_path, as_json=False)
        rows = {row["server"]: row for row in document["rows"]}
        if all(row["messages_per_s"] > 0.7 * 80 for row in rows.values()):
            break
    assert json.loads((tmp_path / "streams.json").read_text()) == document
    assert set(rows) == {"router", "relay", "plain"}
    for row in rows.values():
        assert row["messages_per_s"] == pytest.approx(80, rel=0.3), "a message for each token"
        assert row["us_per_message"] > 0
        assert row["ms_per_request"] > 0
    assert document["message_ratio"] > 0
    shown = capfd.readouterr()
    assert "goal" in shown.out
    assert "Traceback" not in shown.err
