"""The two results files, in the shape of OpenAI's Batch API: what came out, and what failed.

A line of the input has exactly one record, in one of the two. The files are all there is: no other book
says what is finished, so that none can disagree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tandem.offline.finished import FinishedLines
from tandem.offline.journal import Journal, StorageError
from tandem.offline.record import line_of, seal


def error_path(output: Path) -> Path:
    """Where failures go: `results.jsonl` has `results.errors.jsonl` beside it."""
    return output.with_name(f"{output.stem}.errors{output.suffix}")


class _Waiting(NamedTuple):
    line: int
    is_failure: bool
    sealed: bytes
    written: asyncio.Future[None]


class Results:
    """Both files, opened and repaired, for the one process that holds the queue's lock.

    Records that come while others are being written share one write and one wait for the disk (group
    commit), so nobody waits for longer than two of them.
    """

    def __init__(self, output: Path, on_written: Callable[[], None] = lambda: None) -> None:
        self.finished = FinishedLines()
        self._on_written = on_written
        self.num_failed = 0
        self._output = Journal(output, lambda sealed: self._note(line_of(sealed), False))
        self._errors = Journal(error_path(output), lambda sealed: self._note(line_of(sealed), True))
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None

    @property
    def num_completed(self) -> int:
        return self.finished.count - self.num_failed

    @property
    def num_dropped(self) -> int:
        """Lines that were no whole records when the files were opened; their work is done again."""
        return self._output.num_dropped + self._errors.num_dropped

    async def add(self, line: int, members: dict[str, Any], *, is_failure: bool = False) -> None:
        """Returns when the record is on disk. Raises `StorageError`; then it is not.

        A caller that is cancelled meanwhile leaves the record to be written.
        """
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(line, is_failure, seal(line, members), written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all())
        await written

    async def close(self) -> None:
        """When everything that was added is written, or was refused."""
        if self._writer is not None:
            await asyncio.wait({self._writer})
        self._output.close()
        self._errors.close()

    async def _write_all(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._commit, group)
            except StorageError as error:
                for waiting in group:
                    if not waiting.written.cancelled():
                        waiting.written.set_exception(error)
                continue
            for waiting in group:
                self._note(waiting.line, waiting.is_failure)
                if not waiting.written.cancelled():
                    waiting.written.set_result(None)
            self._on_written()

    def _commit(self, group: list[_Waiting]) -> None:
        for journal, is_failure in ((self._output, False), (self._errors, True)):
            records = [waiting.sealed for waiting in group if waiting.is_failure is is_failure]
            if records:
                journal.append(records)

    def _note(self, line: int, is_failure: bool) -> None:
        self.finished.add(line)
        self.num_failed += is_failure
