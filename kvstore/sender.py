"""A writer's end of a put whose bytes cross gRPC: while one chunk is on its way the next is made ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from kvstore.key import Buffer
from kvstore.link import drop
from kvstore.records import ChunkHeader
from kvstore.wire import encode


class Sender:
    """At most one chunk is on its way. `send` sends a message and raises what the store says to it."""

    def __init__(self, send: Callable[[bytes], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self._sending: asyncio.Task[None] | None = None
        self.busy_s = 0.0  # while something was on its way

    async def write(self, chunk: ChunkHeader, payload: Buffer) -> None:
        """Raises what the store said of an earlier chunk. The payload may be changed afterwards."""
        message = encode(chunk, payload)
        await self.settle()
        self._sending = asyncio.create_task(self._send_timed(message))
        await asyncio.sleep(0)

    async def settle(self) -> None:
        """Until everything has been sent."""
        sending, self._sending = self._sending, None
        if sending is not None:
            await sending

    async def _send_timed(self, message: bytes) -> None:
        began_s = time.perf_counter()
        await self._send(message)
        self.busy_s += time.perf_counter() - began_s

    def close(self) -> None:
        """Nothing is sent any more."""
        if self._sending is not None:
            drop(self._sending)
