"""The comparison of split and unsplit sends every mode the same and says who kept the limits."""

from __future__ import annotations

import pytest

from bench import split


@pytest.mark.slow
def test_every_mode_gets_the_same_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "MIXES", {"short": "mix:8*3,300"})
    document = split.run(1.0, (4.0,), tmp_path, as_json=True)
    cells = document["cells"]
    assert [cell["mode"] for cell in cells] == ["split", "unsplit", "auto"]
    assert all(cell["ok"] == 4 for cell in cells)
    assert max(cell["of_best"] for cell in cells) == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"split.json", "split.csv"}
