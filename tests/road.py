"""A road to a server over TCP, which breaks or slows down on demand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Road:
    """Carries bytes between callers and a server; what comes back passes at `bytes_per_s`."""

    def __init__(self, target: str, bytes_per_s: float) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._bytes_per_s = bytes_per_s
        self._writers: set[asyncio.StreamWriter] = set()
        self._journeys: set[asyncio.Task[None]] = set()
        self.num_breaks = 0

    def begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        journey = asyncio.ensure_future(self._carry(reader, writer))
        self._journeys.add(journey)
        journey.add_done_callback(self._journeys.discard)

    def cut(self) -> None:
        self.num_breaks += 1
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        """Nothing of the road is left to the loop's end."""
        while self._journeys:
            self.cut()
            await asyncio.wait(self._journeys, timeout=0.1)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        ends = {writer, far_writer}
        self._writers |= ends
        await asyncio.gather(
            _pump(reader, far_writer, math.inf), _pump(far_reader, writer, self._bytes_per_s)
        )
        self._writers -= ends


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bytes_per_s: float) -> None:
    try:
        while data := await reader.read(4096):
            await asyncio.sleep(len(data) / bytes_per_s)
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def road_to(target: str, bytes_per_s: float = math.inf) -> AsyncIterator[tuple[Road, str]]:
    """The road to "host:port", and its own address."""
    road = Road(target, bytes_per_s)
    server = await asyncio.start_server(road.begin, "127.0.0.1", 0)
    try:
        yield road, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await road.close()
