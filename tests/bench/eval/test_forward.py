"""The costs of a forward, as an experiment."""

from __future__ import annotations

import time
from dataclasses import replace

from bench.eval import forward
from bench.forward.rig import Rig as ForwardRig
from bench.measure import Meter
from tests.bench.eval.files import written


def test_forward_cost(settings, tmp_path, monkeypatch) -> None:
    for name, value in {"TOKENS": 16, "INPUTS": (1, 8, 4096), "OUTPUTS": (1, 4), "LONG": 64}.items():
        monkeypatch.setattr(forward, name, value)
    monkeypatch.setattr(forward, "room", lambda *asked: 512)
    found = forward.run(settings)
    rows = found.tables["rows"]
    assert [row.batch for row in rows if row.sweep == "batch"] == [1, 2, 4, 8, 16]
    assert [row.prompt_tokens for row in rows if row.sweep == "input"] == [1, 8]
    assert [row.new_tokens for row in rows if row.sweep == "output"] == [1, 4]
    cached = [(r.prompt_tokens, r.cache) for r in rows if r.sweep == "cache"]
    assert cached == [(16, True), (16, False), (64, True), (64, False)]
    assert all(0 < row.prefill_s <= row.seconds for row in rows)
    assert "input sweep, 4096 tokens in: out of memory" in found.remarks[-1]
    assert found.sheets[0].rows[1][-2:] == ("40.7", "1.05x")
    assert [line[0] for line in found.sheets[3].rows] == ["16", "64"]
    assert "forward-batch.png" in written(forward, settings, found, tmp_path)


def test_a_prompt_that_would_take_too_long_is_left_out(settings, monkeypatch) -> None:
    monkeypatch.setattr(forward, "INPUTS", (1, 8192))
    rig = ForwardRig(settings.target, "cpu", 16 * 64)
    cost = forward.Cost("tiny", rig, replace(settings, deadline_s=time.monotonic() + 60))
    with Meter("any", 9) as meter:
        rows, remarks = cost.sweep("input", meter)
    assert [row.prompt_tokens for row in rows] == [1]
    assert "input sweep, 8192 tokens in: it may take" in remarks[0]
