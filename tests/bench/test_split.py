"""The comparison of split and unsplit sends every mode the same and says who kept the limits."""

from __future__ import annotations

import pytest

from bench import isolation, split


@pytest.mark.long
def test_every_mode_gets_the_same_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "MIXES", {"short": "mix:8*3,300"})
    monkeypatch.setattr(isolation, "ROUNDS", 1)
    monkeypatch.setattr(isolation, "OUTPUT_TOKENS", 24)
    document = split.run(1.0, (4.0,), tmp_path, as_json=True)
    cells = document["cells"]
    assert [cell["mode"] for cell in cells] == ["split", "unsplit", "auto"]
    assert all(cell["ok"] == 4 for cell in cells)
    assert max(cell["of_best"] for cell in cells) == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"split.json", "split.csv", "cores.csv"}
    assert [row["mode"] for row in document["cores"]] == ["shared", "halves", "all"]
    for row in document["cores"]:
        assert 0 < row["beside_itl_p50"] <= row["beside_itl_p99"]
        assert min(row["alone_tokens_per_s"], row["long_ttft"], row["beside_tokens_per_s"]) > 0


def test_services_that_share_their_cores_differently():
    assert isolation.modes(5) == {
        "shared": {},
        "halves": {"prefill": {"threads": 2}, "decode": {"threads": 2}},
        "all": {"prefill": {"threads": 5}, "decode": {"threads": 5}},
    }
