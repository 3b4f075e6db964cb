"""A queue's progress for people: a live line on a terminal, a plain one now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.offline.progress import Snapshot

PLAIN_LINE_EVERY_S = 10.0


class Display:
    """Shows snapshots on standard error."""

    def __init__(self, what: str, total: int, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, text="")
        self._said_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, snapshot: Snapshot) -> None:
        text = describe(snapshot)
        self._bar.update(self._task, completed=snapshot.done, text=text)
        if not self._console.is_terminal and time.monotonic() - self._said_s > PLAIN_LINE_EVERY_S:
            self._said_s = time.monotonic()
            self._console.print(f"{snapshot.done} of {snapshot.total}: {text}")


def describe(snapshot: Snapshot) -> str:
    """Failed, in flight, rates, the time that is left."""
    left = f", {_duration(snapshot.eta_s)} left" if snapshot.eta_s and snapshot.done < snapshot.total else ""
    return (
        f"{snapshot.failed} failed, {snapshot.in_flight} in flight, {snapshot.tokens_per_s:.0f} tok/s, "
        f"goodput {snapshot.goodput_rps:.1f} req/s{left}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
