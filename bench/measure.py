"""Measuring side by side: arms take turns, medians come with their spread, results go to files and tables.

A machine's speed drifts while it measures. So what is to be compared runs in turns, round by round, each
round in the opposite order of the one before, and ratios are taken within rounds, not between medians.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

A = TypeVar("A")
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
REST_S = 0.3
WIDTH = 140  # of tables that go to a file
PLAIN_LINE_EVERY_S = 10.0  # without a terminal: one line of progress this often at most


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """The median and the extremes. Raises `ValueError` if there are no values."""
        found = sorted(values)
        if not found:
            raise ValueError("nothing was measured")
        return cls(statistics.median(found), found[0], found[-1])

    @classmethod
    def of_ratios(cls, ours: Iterable[float], theirs: Iterable[float]) -> Self:
        """`ours / theirs` within each round. Raises `ValueError` if the rounds do not pair up."""
        return cls.of(mine / other for mine, other in zip(ours, theirs, strict=True))


def interleave(
    arms: Mapping[K, Callable[[], T]],
    rounds: int,
    *,
    warm_ups: int = 1,
    after: Callable[[], None] | None = None,
) -> dict[K, list[T]]:
    """Run all arms `rounds` times in turns; what each returned, by name, without the warm-ups.

    `after` is called after every run of an arm, `(rounds + warm_ups) * len(arms)` times.
    """
    results: dict[K, list[T]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(warm_ups + rounds):
        for name in names if number % 2 == 0 else reversed(names):
            result = arms[name]()
            if number >= warm_ups:
                results[name].append(result)
            if after is not None:
                after()
    return results


def in_turn(work: Callable[[A], T], inputs: Iterable[A]) -> Callable[[], T]:
    """An arm that takes the next input each time it is called."""
    waiting = iter(inputs)
    return lambda: work(next(waiting))


def rest() -> None:
    """Between turns of different runtimes: the threads of some go on spinning for 0.2 s."""
    time.sleep(REST_S)


def dtype_on(device: str) -> str:
    """What benchmarks compute in."""
    return "float32" if device == "cpu" else "bfloat16"


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on: processor, cores, memory, versions, the threads or the GPU that were used."""
    import torch  # seconds, which those who only write tables need not wait

    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    return gpu | {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Meter:
    """A progress bar on a terminal, a line now and then elsewhere; both on standard error."""

    def __init__(self, what: str, total: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task(what, total=total)
        self._said_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, what: str) -> None:
        """What is being measured now."""
        self._bar.update(self._task, description=what)
        self._print_if_due()

    def step(self) -> None:
        """One of the total is done."""
        self._bar.advance(self._task)
        self._print_if_due()

    def _print_if_due(self) -> None:
        task = self._bar.tasks[0]
        due_s = self._said_s + PLAIN_LINE_EVERY_S
        if not self._console.is_terminal and (task.finished or time.monotonic() >= due_s):
            self._said_s = time.monotonic()
            self._console.print(f"{task.completed:.0f} of {task.total:.0f}: {task.description}")


def flat(row: Any) -> dict[str, Any]:
    """A dataclass as one flat mapping; a `Spread` becomes `name`, `name_low` and `name_high`."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Spread):
            columns[field.name] = value.median
            columns[f"{field.name}_low"], columns[f"{field.name}_high"] = value.low, value.high
        else:
            columns[field.name] = value
    return columns


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row; columns are those of the first row. The folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Readable JSON. The folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


class Sheet(NamedTuple):
    """One table of text; the first `left` columns are words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int

    def markdown(self) -> str:
        """Without the title."""
        rule = tuple("---" if index < self.left else "---:" for index in range(len(self.columns)))
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A plain table; the first `left` columns are text, the others numbers."""
    shown = Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        min_width=min(len(title), WIDTH),
    )
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def console(as_json: bool) -> Console:
    """Where tables go: standard output, or standard error if that is kept for JSON."""
    file = sys.stderr if as_json else sys.stdout
    return Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)
