"""What a target's answers are worth in 16, 8 and 4 bits: the tasks of `tandem quality` that need no file.

A service answers over gRPC, as it does for `tandem quality`; files of HumanEval and others are asked there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.embedded import models_of, serving
from bench.eval.attempt import attempt
from bench.eval.experiment import Findings, Settings
from bench.eval.models import Subject, parameters, target_of
from bench.measure import Meter, Sheet, dtype_on
from bench.quality.code import humaneval
from bench.quality.model import ServedModel
from bench.quality.paths import best_paths
from bench.quality.published import published
from bench.quality.report import others
from bench.quality.run import Results, check, evaluate, is_sound
from bench.quality.task import GREEDY, Task
from tandem.client import TandemClient
from tandem.errors import ConfigError

NAME = "quality"
TITLE = "What answers are worth, by precision"
WHOLE = "none"
BITS = {WHOLE: 16, "int8": 8, "nf4": 4}
NODES, PATHS, SEED = 8, 3, 0
SAMPLED = 1  # answers of each problem at temperature 0.7
CONCURRENCY = 8
TASKS = ("HumanEval", "MBPP", "GSM8K")  # whose published figures stand beside ours


@dataclass(frozen=True, slots=True)
class Row:
    """A task by a precision of the target. Scores are from 0 to 1, with an interval of 95 %."""

    target: str
    precision: str
    bits: int
    task: str
    setting: str  # greedy | T 0.7, top_p 0.95
    metric: str
    problems: int
    score: float
    low: float
    high: float
    same: float | None  # share of greedy answers that are those of 16 bits; of sampled ones none


def run(settings: Settings) -> Findings:
    """All precisions that run here, on tasks whose grading is checked first."""
    subject = target_of(settings)
    tasks: list[Task] = [humaneval(None, None), best_paths(settings.samples, NODES, PATHS, SEED)]
    with asyncio.Runner() as runner:
        graded = [runner.run(_graded(task)) for task in tasks]
        study = Study(subject, tasks, settings, runner)
        with Meter(NAME, len(BITS) * (1 + SAMPLED) * sum(len(task.problems) for task in tasks)) as meter:
            rows, skipped = attempt(
                {f"{bits}-bit": name for name, bits in BITS.items()},
                lambda precision: study.rows(precision, meter),
                settings,
                meter,
            )
    remarks = [
        f"{subject.name}: {parameters(subject)}, answered by a service. Intervals are of 95 % over the "
        "problems. Same: greedy answers that are those of 16 bits.",
        f"Grading, checked before: {'; '.join(graded)}. `tandem quality` asks HumanEval, MBPP, GSM8K and "
        "MMLU themselves, from their files.",
    ]
    theirs = [others(task) for task in TASKS]
    return Findings(
        tables={"rows": rows},
        sheets=[_sheet(rows), *(sheet for sheet in theirs if sheet)],
        remarks=remarks + skipped,
        published=[one for task in TASKS for one in published(task)],
    )


class Study:
    """A service per precision; the answers of 16 bits are kept to compare others with."""

    def __init__(
        self, subject: Subject, tasks: Sequence[Task], settings: Settings, runner: asyncio.Runner
    ) -> None:
        self._subject, self._tasks, self._settings, self._runner = subject, tasks, settings, runner
        self._whole: dict[str, dict[str, str]] = {}  # greedy answers by task and problem

    def rows(self, precision: str, meter: Meter) -> Iterator[Row]:
        """Raises `ConfigError` where it does not run here."""
        for task, results in zip(self._tasks, self._runner.run(self._ask(precision, meter)), strict=True):
            same = self._same(precision, task.name, results)
            for row in results.rows:
                yield Row(
                    target=self._subject.name,
                    precision=precision,
                    bits=BITS[precision],
                    task=task.name,
                    setting=row.setting,
                    metric=row.metric,
                    problems=row.problems,
                    score=row.score,
                    low=row.low,
                    high=row.high,
                    same=same if row.setting == GREEDY.name else None,
                )

    async def _ask(self, precision: str, meter: Meter) -> list[Results]:
        values = models_of(self._subject.pair.target, None, precision)
        device = self._settings.device
        values["model"] |= {"device": device, "dtype": dtype_on(device)}
        with serving(values) as address:
            async with TandemClient(address) as client:
                model = ServedModel(client, CONCURRENCY)
                return [await evaluate(task, model, SAMPLED, SEED, meter) for task in self._tasks]

    def _same(self, precision: str, task: str, results: Results) -> float | None:
        """None where 16 bits were not measured."""
        ours = {item.problem: item.answer for item in results.items if item.setting == GREEDY.name}
        if precision == WHOLE:
            self._whole[task] = ours
        whole = self._whole.get(task)
        return sum(ours[problem] == whole[problem] for problem in ours) / len(ours) if whole else None


async def _graded(task: Task) -> str:
    """Raises `ConfigError` where answers cannot be graded, or are graded wrongly."""
    results = await check(task)
    if not is_sound(results):
        raise ConfigError(f"{task.name}: a known right answer failed or a known wrong one passed")
    count = len(task.problems)
    return f"{task.name}: {count} right answers got 1, {count} wrong ones 0"


def _sheet(rows: Sequence[Row]) -> Sheet:
    columns = ("task", "setting", "precision", "metric", "problems", "score", "95 % interval", "same")
    lines = [
        (
            *(row.task, row.setting, f"{row.bits}-bit" + (f" ({row.precision})" if row.bits < 16 else "")),
            *(row.metric, str(row.problems), f"{row.score:.3f}", f"{row.low:.3f} to {row.high:.3f}"),
            "" if row.same is None else f"{row.same:.0%}",
        )
        for row in sorted(rows, key=lambda row: (row.task, row.setting != GREEDY.name, -row.bits))
    ]
    return Sheet("answers", columns, lines, 4)
