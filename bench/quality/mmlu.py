"""Multiple choice (MMLU, Hendrycks et al., 2021, arXiv:2009.03300), by log-likelihood of the letters.

The choice is the letter that the model gives the most probability behind `Answer:`. Nothing is generated,
so an answer in other words cannot be missed, and no sampling acts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.lines import read_csv, read_problems
from bench.quality.model import Model
from bench.quality.task import Grade, Problem, Setting
from tandem.errors import ConfigError

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    choices: Sequence[str]
    answer: str  # its letter

    def shown(self) -> str:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.text, *lines, "Answer:"])


@dataclass(frozen=True, slots=True)
class ChoiceProblem(Problem):
    letters: str


@dataclass(slots=True)
class Mmlu:
    """One subject's file."""

    problems: Sequence[ChoiceProblem]
    name: str = "MMLU"
    metric: str = "accuracy"

    async def prepare(self) -> None:
        """Nothing is run."""

    async def answer(self, model: Model, problem: Problem, setting: Setting, seed: int) -> str:
        assert isinstance(problem, ChoiceProblem)
        asked = (model.log_likelihood(problem.prompt, f" {letter}") for letter in problem.letters)
        scores = await asyncio.gather(*asked)
        return problem.letters[scores.index(max(scores))]

    async def grade(self, problem: Problem, answer: str) -> Grade:
        return Grade(1.0) if answer == problem.right else Grade(0.0, f"{answer}, not {problem.right}")


def mmlu(path: Path, examples: Path | None, shots: int, limit: int | None) -> Mmlu:
    """CSV rows (question, choices, answer) as in the original or below a header, or JSONL with `question`,
    `choices` and `answer`, which is a letter or, from 0, an index. Raises `ConfigError`."""
    solved = _read(examples)[:shots] if examples else []
    shown = "".join(f"{question.shown()} {question.answer}\n\n" for question in solved)
    problems = [
        ChoiceProblem(
            id=str(number),
            prompt=shown + question.shown(),
            right=question.answer,
            wrong=next(letter for letter in LETTERS if letter != question.answer),
            letters=LETTERS[: len(question.choices)],
        )
        for number, question in enumerate(_read(path)[:limit])
    ]
    return Mmlu(problems)


def _read(path: Path) -> list[Question]:
    if path.suffix != ".csv":
        return read_problems(path, _of_json, "multiple-choice JSONL")
    found = []
    num_columns = 0
    for number, row in enumerate(read_csv(path), 1):
        num_columns = num_columns or len(row)
        if number == 1 and row[:1] == ["question"] and row[-1:] == ["answer"]:
            continue
        try:
            if len(row) != num_columns:
                raise ValueError(f"{len(row)} columns, and {num_columns} in the first row")
            answer = row[-1].strip()
            found.append(_question(row[0], row[1:-1], int(answer) if answer.isdecimal() else answer))
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{path}:{number} is no row of MMLU's CSV ({error})") from error
    if not found:
        raise ConfigError(f"{path} has no questions")
    return found


def _of_json(row: Mapping[str, Any]) -> Question:
    return _question(row["question"], row["choices"], row["answer"])


def _question(text: str, choices: Sequence[str], answer: str | int) -> Question:
    if isinstance(answer, int):
        answer = LETTERS[answer]
    if not 2 <= len(choices) <= len(LETTERS) or answer not in LETTERS[: len(choices)] or len(answer) != 1:
        raise ValueError(f"{len(choices)} choices and the answer {answer!r}")
    return Question(text, choices, answer)
