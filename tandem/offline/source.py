"""Where a runner's lines come from."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.offline.finished import FinishedLines
from tandem.offline.grouping import grouped
from tandem.offline.lines import BadLine, Check, Entry, LineParser, read_entries

READ_AHEAD = 64  # lines

Chunk = list[tuple[int, Entry | BadLine]]  # each with its number in the input


class Source(Protocol):
    """Lines that have no record yet."""

    def chunks(self) -> AsyncIterator[Chunk]:
        """A few at a time, read ahead of those that ask; each line once."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """The lines of a file but those that are finished, read by a thread and grouped by their beginnings."""

    input: Path
    parser: LineParser
    check: Check
    finished: FinishedLines

    async def chunks(self) -> AsyncIterator[Chunk]:
        lines = grouped(read_entries(self.input, self.parser, self.check, self.finished))
        while chunk := await asyncio.to_thread(lambda: list(itertools.islice(lines, READ_AHEAD))):
            yield chunk
