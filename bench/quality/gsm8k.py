"""Word problems with one number as the answer (GSM8K, Cobbe et al., 2021, arXiv:2110.14168): exact match."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from bench.quality.lines import read_problems
from bench.quality.model import Model
from bench.quality.task import Grade, Problem, Setting

STOPS = ("\nQuestion:",)
MAX_TOKENS = 256
MARK = "####"  # before the answer, in the file's solutions
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


@dataclass(slots=True)
class Gsm8k:
    """The number behind the last `####` counts, or the last number of all."""

    problems: Sequence[Problem]
    name: str = "GSM8K"
    metric: str = "exact match"

    async def prepare(self) -> None:
        """Nothing is run."""

    async def answer(self, model: Model, problem: Problem, setting: Setting, seed: int) -> str:
        return await model.complete(problem.prompt, setting.sampling(MAX_TOKENS, STOPS, seed))

    async def grade(self, problem: Problem, answer: str) -> Grade:
        expected, found = number_of(problem.right), number_of(answer)
        if found is None:
            return Grade(0.0, "no number")
        return Grade(1.0) if found == expected else Grade(0.0, f"{found}, not {expected}")


def gsm8k(path: Path, examples: Path | None, shots: int, limit: int | None) -> Gsm8k:
    """`shots` solved problems of the other file come before each question. Raises `ConfigError`."""
    solved = read_problems(examples, dict, "GSM8K's JSONL")[:shots] if examples else []
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in solved)
    rows = read_problems(path, dict, "GSM8K's JSONL")[:limit]
    return Gsm8k([_problem(number, row, shown) for number, row in enumerate(rows)])


def number_of(text: str) -> Decimal | None:
    """The answer in a solution: as a value, so that 1,000 and 1000.00 are equal. None if there is none."""
    _, mark, behind = text.rpartition(MARK)
    found = NUMBER.findall(behind)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).replace(",", "").replace("$", ""))


def _problem(number: int, row: Mapping[str, Any], shown: str) -> Problem:
    right = str(row["answer"])
    value = number_of(right)
    wrong = f"{MARK} {0 if value is None else value + 1}"
    return Problem(str(number), f"{shown}Question: {row['question']}\nAnswer:", right, wrong)
