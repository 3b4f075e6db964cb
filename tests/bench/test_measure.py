"""The measuring helpers: turns, medians, files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.measure import (
    Meter,
    Spread,
    flat,
    interleave,
    machine,
    table,
    write_csv,
    write_json,
)

TIMES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    rate: Spread


def test_arms_take_turns_in_alternating_order_and_warm_ups_do_not_count() -> None:
    calls: list[str] = []
    ticks: list[int] = []

    def arm(name: str) -> int:
        calls.append(name)
        return len(calls)

    arms = {"a": lambda: arm("a"), "b": lambda: arm("b")}
    results = interleave(arms, 2, warm_ups=1, after=lambda: ticks.append(1))
    assert "".join(calls) == "abbaab"
    assert results == {"a": [4, 5], "b": [3, 6]}
    assert len(ticks) == 6


@given(TIMES)
def test_a_spread_holds_its_median_between_its_extremes(values) -> None:
    spread = Spread.of(values)
    assert spread.low == min(values)
    assert spread.high == max(values)
    assert spread.low <= spread.median <= spread.high
    assert sum(value <= spread.median for value in values) >= len(values) / 2


@given(TIMES, st.floats(0.1, 10))
def test_ratios_are_taken_within_rounds(values, factor) -> None:
    """A drift that both arms share leaves the ratio alone."""
    spread = Spread.of_ratios([factor * value for value in values], values)
    assert spread.low == pytest.approx(factor)
    assert spread.high == pytest.approx(factor)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        Spread.of([])
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratios([1.0], [1.0, 2.0])


def test_rows_become_files_that_say_the_same(tmp_path) -> None:
    rows = [flat(Row("x", Spread(2.0, 1.0, 3.0))), flat(Row("y", Spread(5.0, 4.0, 6.0)))]
    folder = tmp_path / "new" / "folder"
    write_csv(folder / "rows.csv", rows)
    write_json(folder / "rows.json", {"rows": rows})
    with (folder / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read[1] == {"name": "y", "rate": "5.0", "rate_low": "4.0", "rate_high": "6.0"}
    assert json.loads((folder / "rows.json").read_text())["rows"] == rows


def test_the_machine_is_named() -> None:
    found = machine(threads=3)
    assert found["threads"] == 3
    assert found["processor"]
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0
    json.dumps(found)


def test_progress_without_a_terminal_is_a_line_at_the_end() -> None:
    out = io.StringIO()
    with Meter("first", 3, Console(file=out)) as meter:
        for number in range(3):
            meter.say(f"cell {number}")
            meter.step()
    assert out.getvalue().splitlines() == ["3 of 3: cell 2"]


def test_a_table_aligns_text_left_and_numbers_right() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(table("rates", ("arm", "tokens/s"), [("plain", "9"), ("b", "12.5")]))
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "rates",
        "arm    tokens/s",
        "plain         9",
        "b          12.5",
    ]
