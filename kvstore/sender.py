"""A writer's end of a put whose bytes cross gRPC."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from kvstore.key import Buffer
from kvstore.records import ChunkHeader
from kvstore.wire import encode


class Sender:
    """`send` sends a message and raises what the store says to it."""

    def __init__(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._send = send
        self.busy_s = 0.0  # while something was on its way

    async def write(self, chunk: ChunkHeader, payload: Buffer) -> None:
        began_s = time.perf_counter()
        await self._send(encode(chunk, payload))
        self.busy_s += time.perf_counter() - began_s

    async def settle(self) -> None:
        """Until everything has been sent, which it has."""

    def close(self) -> None:
        """Nothing is sent any more."""
