"""One task from its problems to its figures.

1. Grading must work here: for code, the sandbox is tried.
2. Each problem is answered once greedily and, if asked for, several times with sampling. Seeds follow from
   the run's seed, the problem and the number of the sample.
3. Each answer is graded as it comes. A request that the service refuses as invalid, as one whose prompt is
   too long, is a failure with its reason; other errors end the run.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from bench.measure import Meter
from bench.quality.estimate import interval, pass_at_k
from bench.quality.model import Model
from bench.quality.task import GREEDY, Grade, Problem, Setting, Task
from tandem.errors import InvalidRequest

KS = (1, 10, 100)  # of pass@k, as far as there are samples
Answering = Callable[[Problem, Setting, int], Awaitable["Item"]]
RIGHT, WRONG = Setting("known right answers"), Setting("known wrong answers")


@dataclass(frozen=True, slots=True)
class Item:
    """One answer and its grade."""

    problem: str
    setting: str
    sample: int
    score: float
    why: str
    answer: str


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, with an interval of 95 % over the problems."""

    setting: str
    metric: str
    problems: int
    samples: int  # of each problem
    score: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Results:
    task: str
    rows: list[Row]
    items: list[Item]
    wall_s: float


def sampled(samples: int) -> Setting:
    """The setting of the literature: temperature 0.7, top_p 0.95."""
    return Setting("T 0.7, top_p 0.95", 0.7, 0.95, samples)


async def evaluate(task: Task, model: Model, samples: int, seed: int, meter: Meter | None = None) -> Results:
    """Greedy, and with `samples` sampled answers of each problem. `meter` steps with each answer.

    Raises `ConfigError` and `TandemError`.
    """
    settings = [GREEDY, sampled(samples)] if samples else [GREEDY]

    async def answer(problem: Problem, setting: Setting, sample: int) -> Item:
        drawn = random.Random(f"{seed}/{problem.id}/{sample}").getrandbits(62)
        text = ""
        try:
            text = await task.answer(model, problem, setting, drawn)
            grade = await task.grade(problem, text)
        except InvalidRequest as error:
            grade = Grade(0.0, f"{error.reason}: {error.message}")
        return Item(problem.id, setting.name, sample, grade.score, grade.why, text)

    return await _all(task, settings, answer, meter)


async def check(task: Task) -> Results:
    """Grade the answers that are known to be right, and those known to be wrong, instead of a model's."""

    async def known(problem: Problem, setting: Setting, sample: int) -> Item:
        text = problem.right if setting is RIGHT else problem.wrong
        grade = await task.grade(problem, text)
        return Item(problem.id, setting.name, sample, grade.score, grade.why, text)

    return await _all(task, [RIGHT, WRONG], known)


def is_sound(results: Results) -> bool:
    """Of a check: every right answer got 1 and every wrong one 0."""
    return all(item.score == (1.0 if item.setting == RIGHT.name else 0.0) for item in results.items)


async def _all(
    task: Task, settings: Sequence[Setting], one: Answering, meter: Meter | None = None
) -> Results:
    await task.prepare()
    wanted = [
        (problem, setting, sample)
        for setting in settings
        for problem in task.problems
        for sample in range(setting.samples)
    ]
    began_s = time.monotonic()
    with Meter(task.name, len(wanted)) if meter is None else nullcontext(meter) as shown:

        async def counted(problem: Problem, setting: Setting, sample: int) -> Item:
            item = await one(problem, setting, sample)
            shown.step()
            return item

        items = await asyncio.gather(*(counted(*each) for each in wanted))
    rows = [row for setting in settings for row in _rows(task, setting, items)]
    return Results(task.name, rows, items, time.monotonic() - began_s)


def _rows(task: Task, setting: Setting, items: Sequence[Item]) -> list[Row]:
    """One row; of programs with several samples one for each k."""
    scores: dict[str, list[float]] = {problem.id: [] for problem in task.problems}
    for item in items:
        if item.setting == setting.name:
            scores[item.problem].append(item.score)
    if task.metric != "pass@1":
        return [_row(setting, task.metric, [statistics.fmean(found) for found in scores.values()])]
    return [
        _row(setting, f"pass@{k}", [pass_at_k(len(s), round(sum(s)), k) for s in scores.values()])
        for k in KS
        if k <= setting.samples
    ]


def _row(setting: Setting, metric: str, values: Sequence[float]) -> Row:
    mean = statistics.fmean(values)
    return Row(setting.name, metric, len(values), setting.samples, mean, *interval(mean, len(values)))
