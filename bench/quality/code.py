"""Programs as answers: HumanEval and MBPP. An answer is right if its tests pass, in the sandbox.

HumanEval (Chen et al., 2021, arXiv:2107.03374): the prompt is the head of a function, which the model goes
on with until a line begins that cannot be part of it. MBPP (Austin et al., 2021, arXiv:2108.07732): a
description and the tests as the prompt, three solved problems before it where the file has those.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.quality.lines import read_problems
from bench.quality.model import Model
from bench.quality.sandbox.run import Sandbox
from bench.quality.task import Grade, Problem, Setting

MINI = Path(__file__).with_name("mini.jsonl")
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # as in the paper
MBPP_STOPS = ("[DONE]",)
MBPP_EXAMPLES = (2, 3, 4)  # task ids of the prompt's solved problems, as in the paper
MBPP_TEST = range(11, 511)  # task ids that are the test split of the whole file
MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class CodeProblem(Problem):
    """The program is `before`, the answer and `after`, its tests."""

    before: str  # of the program, in front of the answer
    after: str  # its tests


@dataclass(slots=True)
class CodeTask:
    """Answers are run: as many at once as there are cores."""

    name: str
    problems: Sequence[CodeProblem]
    stops: tuple[str, ...]
    sandbox: Sandbox = field(default_factory=Sandbox)
    metric: str = "pass@1"
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(os.cpu_count() or 1))

    async def prepare(self) -> None:
        """Raises `ConfigError` if the sandbox does not hold."""
        await self.sandbox.check()

    async def answer(self, model: Model, problem: Problem, setting: Setting, seed: int) -> str:
        return await model.complete(problem.prompt, setting.sampling(MAX_TOKENS, self.stops, seed))

    async def grade(self, problem: Problem, answer: str) -> Grade:
        assert isinstance(problem, CodeProblem)
        async with self._slots:
            verdict = await self.sandbox.run(problem.before + answer + problem.after)
        return Grade(float(verdict.passed), verdict.why)


def humaneval(path: Path | None, limit: int | None) -> CodeTask:
    """HumanEval's JSONL, or without a path the ten problems of our own. Raises `ConfigError`."""
    name = "HumanEval" if path else "mini (own problems in HumanEval's format)"
    problems = read_problems(path or MINI, _humaneval, "HumanEval's JSONL")
    return CodeTask(name, problems[:limit], HUMANEVAL_STOPS)


def mbpp(path: Path, limit: int | None) -> CodeTask:
    """MBPP's JSONL, whole or sanitized; of the whole file its test split. Raises `ConfigError`."""
    rows = read_problems(path, dict, "MBPP's JSONL")
    examples = [row for row in rows if row.get("task_id") in MBPP_EXAMPLES]
    test = [row for row in rows if row.get("task_id") in MBPP_TEST]
    asked = test or [row for row in rows if row not in examples]
    shown = "".join(f"{_mbpp_prompt(row)}{row['code']}\n[DONE]\n\n" for row in examples)
    return CodeTask("MBPP", [_mbpp(row, shown) for row in asked][:limit], MBPP_STOPS)


def _humaneval(row: Mapping[str, Any]) -> CodeProblem:
    prompt, entry_point = str(row["prompt"]), str(row["entry_point"])
    if not entry_point.isidentifier():
        raise ValueError(f"entry_point {entry_point!r} is no name")
    return CodeProblem(
        id=str(row["task_id"]),
        prompt=prompt,
        right=str(row["canonical_solution"]),
        wrong="    raise NotImplementedError\n",
        before=prompt,
        after=f"\n{row['test']}\ncheck({entry_point})\n",
    )


def _mbpp(row: Mapping[str, Any], shown: str) -> CodeProblem:
    imports = "\n".join(row.get("test_imports") or [row.get("test_setup_code") or ""])
    tests = "\n".join(map(str, row["test_list"]))
    return CodeProblem(
        id=str(row["task_id"]),
        prompt=shown + _mbpp_prompt(row),
        right=str(row["code"]),
        wrong="raise NotImplementedError\n",
        before="",
        after=f"\n{imports}\n{tests}\n",
    )


def _mbpp_prompt(row: Mapping[str, Any]) -> str:
    described = row.get("text") or row["prompt"]  # the latter in the sanitized file
    tests = "\n".join(map(str, row["test_list"]))
    return (
        f"You are an expert Python programmer, and here is your task: {described} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
