"""The comparison of split and unsplit sends every mode the same and says who kept the limits."""

from __future__ import annotations

import pytest

from bench import isolation, split
from tandem.errors import ConfigError


@pytest.mark.long
def test_every_mode_gets_the_same_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "MIXES", {"short": "mix:8*3,300"})
    monkeypatch.setattr(isolation, "ROUNDS", 1)
    monkeypatch.setattr(isolation, "OUTPUT_TOKENS", 24)
    document = split.run("raw", "none", 1.0, (4.0,), tmp_path, as_json=True)
    cells = document["cells"]
    assert [cell["mode"] for cell in cells] == ["split", "unsplit", "auto", "whole"]
    assert all(cell["in_time"] >= cell["good"] for cell in cells)
    assert all(cell["ok"] == 4 for cell in cells)
    assert max(cell["of_best"] for cell in cells) == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"split.json", "split.csv", "cores.csv"}
    assert [row["mode"] for row in document["cores"]] == ["shared", "halves", "all", "chunks", "whole"]
    for row in document["cores"]:
        assert 0 < row["beside_itl_p50"] <= row["beside_itl_p99"]
        assert min(row["alone_tokens_per_s"], row["long_ttft"], row["beside_tokens_per_s"]) > 0


def test_services_that_share_their_cores_differently():
    assert isolation.modes(5) == {
        "shared": {},
        "halves": {"prefill": {"threads": 2}, "decode": {"threads": 2}},
        "all": {"prefill": {"threads": 5}, "decode": {"threads": 5}},
        "chunks": {"router": {"disaggregate": "never"}, "decode": {"threads": 5}},
        "whole": {
            "router": {"disaggregate": "never"},
            "decode": {"threads": 5, "prefill_tokens": 1 << 14, "stall_s": 1e6},
        },
    }


def test_gaps_of_a_service_that_computes_prompts_whole_beside_those_of_the_split():
    def cell(mode: str, itl_p99: float | None, in_time: float) -> split.Cell:
        return split.Cell("m", 2.0, mode, 9, *(1.0,) * 3, itl_p99, *(1.0,) * 6, in_time)

    cells = [cell("split", 20.0, 1.0), cell("unsplit", 40.0, 0.9), cell("whole", 90.0, 0.75)]
    assert split.calm(cells).rows == [("m", "2", "20.0", "40.0", "90.0", "4.5", "100%", "90%", "75%")]
    [row] = split.calm([cell("split", None, 1.0), *cells[1:]]).rows
    assert row[2:6] == ("–", "40.0", "90.0", "–")


def test_a_kind_of_weights_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="int7"):
        split.run("raw", "int7", 1.0, (4.0,), tmp_path, as_json=True)
