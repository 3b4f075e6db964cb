"""A writer's end of an object's file: chunks are copied to where they will be read, and the store is told.

Only the notes cross gRPC, each for everything that was copied since the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from kvstore.key import Buffer
from kvstore.link import drop
from kvstore.records import ChunkHeader, Placed
from kvstore.wire import head_of

NOTE_S = 0.001  # chunks that come closer together share a note


class Placer:
    """Fills a file from its beginning. `tell` sends a note and raises what the store says to it."""

    def __init__(self, view: memoryview, tell: Callable[[Placed], Awaitable[None]]) -> None:
        self._view = view
        self._tell = tell
        self._end = self._told = 0
        self._loop = asyncio.get_running_loop()
        self._yield_at_s = 0.0
        self._is_complete = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    async def write(self, chunk: ChunkHeader, payload: Buffer) -> None:
        """Raises what the store said of an earlier chunk."""
        self._check()
        head = head_of(chunk, chunk.length)
        start = self._end + len(head)
        self._view[self._end : start] = head
        self._end = start + chunk.length
        self._view[start : self._end] = memoryview(payload).cast("B")
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell_all())
        if self._loop.time() >= self._yield_at_s:
            await asyncio.sleep(0)
            self._yield_at_s = self._loop.time() + NOTE_S

    async def settle(self) -> None:
        """Until the store has been told of everything."""
        self._is_complete.set()
        if self._telling is not None:
            await self._telling

    def close(self) -> None:
        """Nothing is said or written any more, and the mapping is let go, whoever still knows this object."""
        self._view = memoryview(b"")
        if self._telling is not None:
            drop(self._telling)

    def _check(self) -> None:
        if self._telling is not None and self._telling.done():
            telling, self._telling = self._telling, None
            telling.result()

    async def _tell_all(self) -> None:
        while self._told < self._end:
            with suppress(TimeoutError):
                async with asyncio.timeout(NOTE_S):
                    await self._is_complete.wait()
            end = self._end
            await self._tell(Placed(end=end))
            self._told = end
