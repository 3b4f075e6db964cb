"""docs/faults.md has every fault of the store, the index and of names, and the tests it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    f"{part}{number}" for part, count in (("C", 16), ("D", 10), ("J", 12)) for number in range(1, count + 1)
]


def table() -> dict[str, list[str]]:
    """Tests by row."""
    lines = re.findall(
        r"^\| ([CDJ]\d+) \|[^|]+\|(.+)\|$", (ROOT / "docs/faults.md").read_text(), re.MULTILINE
    )
    assert len(lines) == len({row for row, _ in lines}), "a row is there twice"
    return {row: re.findall(r"`(tests/[^`]+)`", tests) for row, tests in lines}


def test_every_row_is_there():
    assert sorted(table()) == sorted(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_the_tests_of_a_row_exist(row):
    assert table()[row]
    for test in table()[row]:
        path, _, name = test.partition("::")
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions, test
