"""A runner's side of a queue in Redis: where its lines come from, and where its records go.

It says once a second that it lives. While it does, the lines it was given are its own; when it is silent for
its lease, others take them over. A line that so many runners were given that it must be what ends them is
a dead letter.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from tandem.errors import Internal, Unavailable
from tandem.offline import members
from tandem.offline.shared.patience import Patience
from tandem.offline.shared.queue import EndedError, Held, SharedQueue
from tandem.offline.source import Chunk

TAKEN = 16  # lines at once
MAX_DELIVERIES = 10
LOOK_EVERY_S = 1.0  # for runners that have died, and for the queue's end


class SharedRunner:
    """Both the source and the sink of a `Runner`: `async with` it around its run."""

    def __init__(self, queue: SharedQueue, patience_s: float) -> None:
        self.name = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._queue = queue
        self._patience = Patience(patience_s)
        self._held: dict[int, Held] = {}  # by line
        self._num_known_failures = 0

    async def __aenter__(self) -> Self:
        await self._patience.call(self._queue.beat, self.name)
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beating.cancel()
        await asyncio.wait({self._beating})
        if not self._patience.is_failing:
            await self._patience.call(self._queue.leave, self.name)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Until the queue has ended."""
        with suppress(EndedError):
            while not await self._has_ended():
                held = await self._patience.call(self._queue.claim_from_dead, self.name, TAKEN)
                until_s = time.monotonic() + LOOK_EVERY_S
                while held or time.monotonic() < until_s:
                    held = held or await self._next()
                    fresh = [one for one in held if one.entry.line not in self._held]  # or in flight here
                    self._held |= {one.entry.line: one for one in held}
                    chunk = [one for one in fresh if not await self._is_dead_letter(one)]
                    if chunk:
                        yield [(one.entry.line, one.entry) for one in chunk]
                    held = []

    async def add(self, line: int, record: dict[str, Any], *, is_failure: bool = False) -> None:
        """Returns when the record is in Redis, this one or that of another runner."""
        code = record["error"]["code"] if is_failure else ""
        await self._patience.call(self._queue.finish, self.name, self._held[line], code, record)
        del self._held[line]

    async def _next(self) -> list[Held]:
        """New lines; after a failure those, too, that were given to us in a reply that never came."""
        if self._patience.num_failures > self._num_known_failures:
            self._num_known_failures = self._patience.num_failures
            held = await self._patience.call(self._queue.held_by, self.name)
            if lost := [one for one in held if one.entry.line not in self._held]:
                return lost
        return await self._patience.call(self._queue.take, self.name, TAKEN)

    async def _has_ended(self) -> bool:
        job = await self._patience.call(self._queue.job)
        return not job or "ended" in job

    async def _is_dead_letter(self, held: Held) -> bool:
        if held.deliveries <= MAX_DELIVERIES:
            return False
        error = Internal("DEAD_LETTER", f"{held.deliveries - 1} runners ended while they had this line")
        record = members.of_failure(held.entry, error, attempts=held.deliveries - 1)
        await self.add(held.entry.line, record, is_failure=True)
        return True

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._queue.lease_s / 5)
            with suppress(Unavailable):  # whoever needs Redis for more than this says so
                await self._patience.call(self._queue.beat, self.name)
