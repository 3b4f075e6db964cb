"""From lines to records: many at once, each until it has exactly one record.

1. The source (tandem/offline/source.py) is read some lines ahead; it has only lines without a record.
2. A line waits for a place in the window and is sent; a bad one becomes an error record at once.
3. What can be sent again is, after a while; a line that keeps failing becomes an error record.
4. A record counts when it is on disk. Whatever ends this process, the next run goes on from there.

Knows nothing of the service: `execute` asks it, and raises `TandemError`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tandem.errors import TandemError, Unauthenticated, Unavailable
from tandem.offline import members
from tandem.offline.lines import BadLine, Entry
from tandem.offline.members import Answer
from tandem.offline.progress import Progress
from tandem.offline.retries import Attempts, is_overload
from tandem.offline.source import Source
from tandem.offline.window import Window

Execute = Callable[[Entry], Awaitable[Answer]]


class Sink(Protocol):
    """Where records go."""

    async def add(self, line: int, members: dict[str, Any], *, is_failure: bool = False) -> None:
        """Returns when the record is safe. Raises what ends the run."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, and how hard to try."""

    max_in_flight: int = 64
    max_attempts: int = 3
    patience_s: float = 600.0  # without one completed line, while the service is away
    grace_s: float = 5.0  # for what is in flight when told to stop


@dataclass(slots=True)
class Runner:
    """One run over one source. `stop` may be set at any time; then it ends within the grace."""

    source: Source
    execute: Execute
    results: Sink
    progress: Progress
    limits: Limits = field(default_factory=Limits)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _window: Window = field(init=False)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _failure: BaseException | None = None
    _completed_s: float = field(default_factory=time.monotonic)  # when the last line was

    def __post_init__(self) -> None:
        self._window = Window(self.limits.max_in_flight)

    async def run(self) -> None:
        """Until every line has its record, or until told to stop.

        Raises `StorageError`, and `Unavailable` or `Unauthenticated` if the service answers nobody.
        """
        sending = asyncio.create_task(self._send_all())
        stopping = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not sending.done():
                sending.cancel()
                if self._tasks and self._failure is None:
                    await asyncio.wait(self._tasks, timeout=self.limits.grace_s)
        finally:
            everything = {sending, stopping, *self._tasks}
            for task in everything:
                task.cancel()
            await asyncio.wait(everything)
        if self._failure is not None:
            raise self._failure
        if not sending.cancelled():
            sending.result()

    async def _send_all(self) -> None:
        async for chunk in self.source.chunks():
            for line, found in chunk:
                generation = await self._window.enter()
                self.progress.in_flight = self._window.in_flight
                task = asyncio.create_task(self._finish(line, found, generation))
                self._tasks.add(task)
                task.add_done_callback(self._ended)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._window.leave()
        self.progress.in_flight = self._window.in_flight
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            self.stop.set()

    async def _finish(self, line: int, found: Entry | BadLine, generation: int) -> None:
        if isinstance(found, BadLine):
            await self.results.add(line, members.of_bad_line(line, found), is_failure=True)
            self.progress.note(0, is_failure=True)
        else:
            await self._complete(found, generation)

    async def _complete(self, entry: Entry, generation: int) -> None:
        """Ask until there is an answer, or no point in asking again."""
        attempts = Attempts(self.limits.max_attempts)
        while True:
            completed = self.progress.completed
            try:
                answer = await self.execute(entry)
            except TandemError as error:
                self._check_service(error)
                if attempts.give_up(error, others_completed=self.progress.completed > completed):
                    await self._add_failure(entry, error, attempts.sent)
                    return
                if is_overload(error):
                    generation = self._window.note_refusal(generation)
                self.progress.retries += 1
                await asyncio.sleep(attempts.backoff_s(error))
            else:
                await self._add_answer(entry, answer, attempts.sent + 1)
                return

    async def _add_answer(self, entry: Entry, answer: Answer, attempts: int) -> None:
        self._window.note_success()
        self._completed_s = time.monotonic()
        await self.results.add(entry.line, members.of_answer(entry, answer, attempts=attempts))
        self.progress.note(answer.output_tokens)

    async def _add_failure(self, entry: Entry, error: TandemError, attempts: int) -> None:
        failure = members.of_failure(entry, error, attempts=attempts)
        await self.results.add(entry.line, failure, is_failure=True)
        self.progress.note(0, is_failure=True)

    def _check_service(self, error: TandemError) -> None:
        """Raise what would fail every line: that is for whoever runs the queue, not for the records."""
        silent_s = time.monotonic() - self._completed_s
        if isinstance(error, Unauthenticated) or (
            isinstance(error, Unavailable) and silent_s > self.limits.patience_s
        ):
            raise error
