"""What an experiment is: settings in; rows, tables, charts and remarks out.

Knows nothing of files and terminals (report.py does that) nor of any experiment.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.measure import Sheet


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line chooses; each experiment takes what concerns it."""

    shape: str = "raw"  # the bundled pair as it was trained, or the cost it is grown to
    target: Path | None = None  # a pair of the caller's instead
    draft: Path | None = None
    texts: tuple[Path, ...] = ()  # files to take samples from instead of the bundled pair's held-out text
    samples: int = 16
    rounds: int = 3
    threads: int = 2
    device: str = "cpu"  # or cuda, or cuda:1
    deadline_s: float = float("inf")  # on the monotonic clock: nothing new is begun later

    @property
    def left_s(self) -> float:
        """Time that this experiment still has."""
        return self.deadline_s - time.monotonic()


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one kind of bars, over the places of a chart."""

    name: str
    places: Sequence[str | float]  # words are evenly spaced
    values: Sequence[float]
    is_expected: bool = False  # by theory or by others: thin and dashed


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture: a line per series, or bars side by side."""

    name: str  # of the file, behind the experiment's
    title: str
    below: str
    beside: str
    series: Sequence[Series]
    is_bars: bool = False
    is_log: bool = False  # both axes
    level: float | None = None  # a line to compare with


@dataclass(slots=True)
class Findings:
    """What an experiment brought."""

    tables: dict[str, Sequence[Any]] = field(default_factory=dict)  # dataclasses, by CSV; the first: `rows`
    sheets: list[Sheet] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    published: Sequence[Any] = ()  # dataclasses: others' figures, in full


class Experiment(Protocol):
    """One module of this package."""

    NAME: str  # of the command and of the files
    TITLE: str

    def run(self, settings: Settings) -> Findings:
        """Measure. Raises `ConfigError` for what cannot be measured here."""
