"""Notices that the sweep stands still, which nothing on a loop or a thread that stands still could.

Counts its own ticks and compares no clocks: a process that was stopped for an hour and goes on has not
been stuck.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

TICK_S = 1.0
MOST_TICKS = 30  # without a sweep


class Watchdog:
    """A thread that calls `on_hang` once if `progress` has not changed for `most_ticks`."""

    def __init__(
        self,
        progress: Callable[[], int],
        on_hang: Callable[[], None],
        tick_s: float = TICK_S,
        most_ticks: int = MOST_TICKS,
    ) -> None:
        self._progress = progress
        self._on_hang = on_hang
        self._tick_s = tick_s
        self._most_ticks = most_ticks
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        num_silent, last = 0, self._progress()
        while not self._is_over.wait(self._tick_s):
            now = self._progress()
            num_silent, last = (0 if now != last else num_silent + 1), now
            if num_silent >= self._most_ticks:
                self._on_hang()
                return
