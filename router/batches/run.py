"""Running one batch: the same census, runner and journals as those of `tandem queue`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from router.batches.asking import RouterAsker
from router.batches.batch import TRANSITIONS, Batch, BatchStatus
from router.batches.book import BatchBook
from router.batches.pulse import Pulse
from tandem.config import BatchConfig
from tandem.offline import members
from tandem.offline.census import DuplicateError, take_census
from tandem.offline.lines import BadLine, Entry, LineParser, read_entries
from tandem.offline.progress import Progress
from tandem.offline.results import Results
from tandem.offline.runner import Limits, Runner
from tandem.offline.source import READ_AHEAD, FileSource

PATIENCE_S = float("inf")  # for workers that are away: what runs in the service waits with it
GRACE_S = 5.0


class Model(NamedTuple):
    """What this service serves."""

    name: str
    fingerprint: str


class _Stopped(Exception):
    """The census was told to end."""


@dataclass(slots=True)
class BatchRun:
    """From where the batch is to its end, or until `stop`: then it goes on after the next start."""

    batch: Batch
    book: BatchBook
    ask: RouterAsker
    model: Model
    limits: BatchConfig
    max_in_flight: int
    changed: Pulse  # beats with every record, and at the end
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    progress: Progress = field(init=False)
    _entering: asyncio.Lock = field(default_factory=asyncio.Lock)
    _is_late: bool = False  # its window is over

    def __post_init__(self) -> None:
        self.progress = Progress(self.batch.total, self.batch.completed, self.batch.failed)

    async def run(self) -> None:
        """Raises `StorageError` and `OSError` if the disk does not take it."""
        if not self.batch.input_file_id:
            await self.enter(BatchStatus.EXPIRED)
        if self.batch.status is BatchStatus.VALIDATING and not await self._validated():
            return
        if self.batch.status is BatchStatus.IN_PROGRESS and not await self._answered():
            await asyncio.to_thread(self.book.save, self.now())
            return
        if not self.batch.status.has_ended:
            await self._finish()

    def now(self) -> Batch:
        """The batch with the counts of this moment."""
        return replace(self.batch, completed=self.progress.completed, failed=self.progress.failed)

    async def enter(self, status: BatchStatus, **changes: object) -> bool:
        """Into the next status, on disk before it is seen; whether that was still possible."""
        async with self._entering:
            if status not in TRANSITIONS.get(self.batch.status, ()):
                return False
            following = self.now().to(status, time.time(), **changes)
            await asyncio.to_thread(self.book.save, following)
            self.batch = following
            return True

    @property
    def _parser(self) -> LineParser:
        return LineParser(False, {}, self.model.fingerprint)

    def _check(self, entry: Entry) -> None:
        """Raises `BadLine`. Runs in a thread, which lets tokens pass between two lines."""
        time.sleep(0)
        if entry.url != self.batch.endpoint:
            raise BadLine("BAD_LINE", f"`url` must be the batch's, {self.batch.endpoint}", entry.custom_id)
        self.ask.check(entry)

    def _check_unless_stopped(self, entry: Entry) -> None:
        if self.stop.is_set():
            raise _Stopped
        self._check(entry)

    async def _validated(self) -> bool:
        """Whether there is anything that can be run."""
        path = self.book.input(self.batch)
        try:
            census = await asyncio.to_thread(take_census, path, self._parser, self._check_unless_stopped)
        except _Stopped:  # it was cancelled, or the service ends and begins anew
            return self.batch.status is BatchStatus.CANCELLING
        except DuplicateError as error:
            await self._fail("duplicate_custom_id", error.told, error.line)
            return False
        if not census.total:
            await self._fail("empty_file", "the input file has no lines")
            return False
        named = {"model": self.model.name, "model_fingerprint": self.model.fingerprint}
        await self.enter(BatchStatus.IN_PROGRESS, total=census.total, **named)
        return True  # a batch that was cancelled at the last line has something to finish, too

    async def _answered(self) -> bool:
        """Whether the batch comes to an end: all answered, cancelled, or its time is over."""
        if self.batch.model_fingerprint != self.model.fingerprint:
            told = f"the batch was begun with {self.batch.model} in another build, which is not served here"
            await self._fail("model_changed", told)
            return False
        async with self._results() as results:
            runner = Runner(
                source=FileSource(self.book.input(self.batch), self._parser, self._check, results.finished),
                execute=self.ask,
                results=results,
                progress=self.progress,
                limits=Limits(self.max_in_flight, self.limits.max_attempts, PATIENCE_S, GRACE_S),
                stop=self.stop,
            )
            left_s = self.batch.expires_s - time.time()
            expiry = asyncio.get_running_loop().call_later(max(left_s, 0), self._expire)
            try:
                await runner.run()
            finally:
                expiry.cancel()
        is_done = results.finished.count == self.batch.total
        if is_done:
            await self.enter(BatchStatus.FINALIZING)
        return is_done or self.batch.status is BatchStatus.CANCELLING or self._is_late

    def _expire(self) -> None:
        self._is_late = True
        self.stop.set()

    @contextlib.asynccontextmanager
    async def _results(self) -> AsyncIterator[Results]:
        results = await asyncio.to_thread(Results, self.book.output(self.batch), self.changed.beat)
        self.progress = Progress(self.batch.total, results.num_completed, results.num_failed)
        try:
            yield results
        finally:
            await results.close()

    async def _finish(self) -> None:
        """Give the results to their owner, and say how it ended."""
        match self.batch.status:
            case BatchStatus.FINALIZING:
                end = BatchStatus.COMPLETED
            case BatchStatus.CANCELLING:
                end = BatchStatus.CANCELLED
            case _:
                end = BatchStatus.EXPIRED
                await self._expire_rest()
        await self._end(end)

    async def _expire_rest(self) -> None:
        """Lines that have no record get one that says why."""
        path = self.book.input(self.batch)
        async with self._results() as results:
            lines = read_entries(path, self._parser, finished=results.finished)
            while chunk := await asyncio.to_thread(lambda: list(itertools.islice(lines, READ_AHEAD))):
                records = [(line, members.of_expired(found, line)) for line, found in chunk]
                await asyncio.gather(*(results.add(*record, is_failure=True) for record in records))
                for _ in records:
                    self.progress.note(0, is_failure=True)

    async def _fail(self, code: str, message: str, line: int | None = None) -> None:
        error = {"code": code, "message": message, "line": line, "param": None}
        await self._end(BatchStatus.FAILED, errors=[error])

    async def _end(self, status: BatchStatus, **changes: object) -> None:
        """For a batch that was cancelled meanwhile this is not the end: its next run comes to that."""
        named = await asyncio.to_thread(self.book.publish, self.batch)
        if await self.enter(status, **named, **changes):
            await asyncio.to_thread(self.book.clear, self.batch)
