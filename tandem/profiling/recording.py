"""A window of steps as it happened: spans of the computing thread, and transfers beside it.

The window opens with the first outermost span, whose thread is the computing one from then on, and closes
when there are enough of them, or when that thread ends. Spans of other threads are not its business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

MAX_BESIDE = 10_000  # transfers that are kept; a window that stays open for ever must not grow
_EPOCH_NS = time.time_ns() - time.perf_counter_ns()


class Span(NamedTuple):
    """`depth` 0 is a step. `parts` are the nanoseconds that counters went on by meanwhile."""

    name: str
    depth: int
    start_ns: int  # since the epoch
    end_ns: int
    parts: tuple[float, ...] = ()


def now_ns() -> int:
    """Since the epoch, by a clock that is never set."""
    return _EPOCH_NS + time.perf_counter_ns()


class Instruments(Protocol):
    """What measures besides the spans, on the computing thread, while the window is open."""

    def open(self) -> None: ...

    def close(self) -> None: ...

    def enter(self, name: str) -> None: ...

    def leave(self) -> None: ...

    def counters(self) -> Sequence[float]: ...


class Recording:
    """A `Recorder` of at most `num_steps` steps. `on_end` is called once, on the computing thread."""

    def __init__(self, num_steps: int, instruments: Instruments, on_end: Callable[[], None]) -> None:
        self.spans: list[Span] = []
        self.beside_spans: list[Span] = []
        self.num_beside_left_out = 0
        self._num_left = num_steps
        self._instruments = instruments
        self._on_end = on_end
        self._thread: int | None = None
        self._depth = 0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether the window is; there are no spans before, and no more after."""
        return self._thread is not None and self._num_left > 0

    def span(self, name: str) -> AbstractContextManager[None]:
        if self._thread is None:
            with self._lock:  # two threads may come at once
                if self._thread is None:
                    self._thread = threading.get_ident()
                    self._instruments.open()
        if self._num_left and self._thread == threading.get_ident():
            return self._record(name)
        return nullcontext()

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        start_ns = now_ns()
        try:
            yield
        finally:
            if self.is_open and len(self.beside_spans) < MAX_BESIDE:
                self.beside_spans.append(Span(name, 0, start_ns, now_ns()))
            elif self.is_open:
                self.num_beside_left_out += 1

    def end(self) -> None:
        """Close the window, on the computing thread; of another thread there is nothing to close."""
        if self.is_open and self._thread == threading.get_ident():
            self._num_left = 0
            self._instruments.close()
            self._on_end()

    @contextmanager
    def _record(self, name: str) -> Iterator[None]:
        depth, before = self._depth, self._instruments.counters()
        self._instruments.enter(name)
        self._depth += 1
        start_ns = now_ns()
        try:
            yield
        finally:
            end_ns = now_ns()
            self._depth = depth
            self._instruments.leave()
            after = self._instruments.counters()
            parts = tuple(now - then for then, now in zip(before, after, strict=True))
            self.spans.append(Span(name, depth, start_ns, end_ns, parts))
            if not depth:
                self._count_step()

    def _count_step(self) -> None:
        if self._num_left == 1:
            self.end()
        else:
            self._num_left -= 1
