"""What answers are worth, as an experiment: real services on a tiny checkpoint, programs in the sandbox."""

from __future__ import annotations

import pytest

from bench.eval import quality
from bench.quality.run import Item, Results
from tandem.errors import ConfigError
from tests.bench.eval.files import written

pytestmark = pytest.mark.e2e


def test_answers_by_precision(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "BITS", {"none": 16, "int8": 8})
    found = quality.run(settings)
    rows = found.tables["rows"]
    tasks = {row.task: row.problems for row in rows}
    assert sorted(tasks.values()) == [2, 10]  # graphs as samples, and our own programs
    assert {(r.task, r.bits, r.setting) for r in rows} == {
        (task, bits, setting)
        for task in tasks
        for bits in (16, 8)
        for setting in ("greedy", "T 0.7, top_p 0.95")
    }
    for row in rows:
        assert row.score == 0  # letters at random solve nothing
        assert row.low == 0 < row.high < 1
        assert (row.same is None) == (row.setting != "greedy")
    assert {row.same for row in rows if row.bits == 16 and row.setting == "greedy"} == {1.0}
    assert "10 right answers got 1, 10 wrong ones 0" in found.remarks[1]
    assert len(found.remarks) == 2
    assert "0.292 / 0.323 / 0.336" in found.sheets[1].markdown()
    assert "quality.csv" in written(quality, settings, found, tmp_path)


def test_nothing_is_asked_where_grading_is_unsound(settings, monkeypatch) -> None:
    async def check(task):
        return Results(task.name, [], [Item("0", "known right answers", 0, 0.0, "it failed", "")], 0.0)

    monkeypatch.setattr(quality, "check", check)
    with pytest.raises(ConfigError, match="a known right answer failed"):
        quality.run(settings)
