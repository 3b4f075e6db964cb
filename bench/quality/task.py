"""What every task consists of: problems with an answer that is known, and a way to grade another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.quality.model import Model
from tandem.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Problem:
    """`right` and `wrong` are answers by which the grading itself is checked."""

    id: str
    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Grade:
    """From 0 to 1; `why` says what is missing, in one line."""

    score: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """How answers are drawn. Greedy ones are drawn once, as they would all be equal."""

    name: str
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1  # of each problem

    def sampling(self, max_tokens: int, stop: tuple[str, ...], seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, stop=stop, seed=seed
        )


GREEDY = Setting("greedy")


class Task(Protocol):
    """One benchmark."""

    name: str
    metric: str  # what a score is

    @property
    def problems(self) -> Sequence[Problem]: ...

    async def prepare(self) -> None:
        """Before the first grade. Raises `ConfigError` if answers cannot be graded here."""

    async def answer(self, model: Model, problem: Problem, setting: Setting, seed: int) -> str:
        """What the model says. Raises `TandemError`."""

    async def grade(self, problem: Problem, answer: str) -> Grade: ...
