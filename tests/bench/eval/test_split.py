"""Split against unsplit, as an experiment."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from bench.eval import split
from tests.bench.eval.files import written


def cell(mix: str, rate: float, mode: str, good: float | None) -> split.Cell:
    return split.Cell(
        mix, rate, mode, 9, 1.0, None, 2.0, None, 50.0, 1.0, good, 1.0, (good or 0.0) / 2, *(1.0, 1.0)
    )


def test_split_against_unsplit(settings, tmp_path, monkeypatch) -> None:
    few, many = split.MIXES
    cells = [
        cell(m, r, mode, 0.5 + (mode == "split") * (r - 2) / 10)
        for m in (few, many)
        for r in (1.0, 2.0, 3.0)
        for mode in split.MODES
    ]
    asked = []
    monkeypatch.setattr(split, "measure", lambda *given: asked.append(given) or cells)
    chosen = replace(settings, deadline_s=time.monotonic() + 60)
    found = split.run(chosen)
    [(seconds, _, models, deadline_s)] = asked
    assert seconds == pytest.approx(0.6 * 60 / 18, rel=0.01)
    assert deadline_s == chosen.deadline_s
    assert models["speculation"] == {"draft": "model", "draft_path": str(settings.draft)}
    assert models["model"] == {"path": str(settings.target), "quantization": "none"}
    assert found.remarks[1].startswith(
        f"Good requests: split against unsplit loses with {few} at 1/s (40% against 50%), {many} at 1/s"
    )
    assert f"wins with {few} at 3/s (60% against 50%)" in found.remarks[1]
    assert "auto against unsplit draws with" in found.remarks[2]
    assert {"split-few-long.png", "split-many-long.png"} <= written(split, settings, found, tmp_path)


def test_the_map_says_who_keeps_which_limits() -> None:
    cells = [cell("m", 2.0, mode, good) for mode, good in zip(split.MODES, (0.4, 0.8, 0.6), strict=True)]
    tight, usual, loose = split.win_map(cells).rows
    assert tight[2] == "TTFT ≤ 500 ms, ITL p99 of a request ≤ 25 ms"
    assert tight[3:] == ("20%", "40%", "30%", "unsplit", "0.75")
    assert usual[3:] == ("40%", "80%", "60%", "unsplit", "0.75")
    assert loose[3:] == ("100%", "100%", "100%", "as good", "1.00")
