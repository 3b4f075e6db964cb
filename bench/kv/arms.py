"""One transfer of each kind, timed: the store's put and get, plain bytes over gRPC, copies in memory."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from bench.kv.child import RAW
from kvstore.client import KvClient
from kvstore.key import KvHandle
from kvstore.records import ChunkRange, ObjectHeader
from tandem import event_loop
from tandem.allocator import keep_pages
from tandem.errors import ConfigError
from tandem.redis_url import redacted
from tandem.rpc import channel

BLOCK_SIZE = 16
STORE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """What is moved: `num_bytes` in all, in chunks, over so many channels at once."""

    num_bytes: int
    chunk_bytes: int
    num_channels: int

    @property
    def num_chunks(self) -> int:
        """Of each channel."""
        return self.num_bytes // self.num_channels // self.chunk_bytes

    def header(self) -> ObjectHeader:
        """One layer; one chunk is one block."""
        return ObjectHeader(
            object_id=secrets.token_bytes(16),
            epoch=0,
            tenant="",
            fingerprint=bytes(32),
            dtype="float32",
            num_layers=1,
            num_tokens=self.num_chunks * BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            num_blocks=self.num_chunks,
            total_bytes=self.num_chunks * self.chunk_bytes,
        )


class Peer:
    """The process in bench/kv/child.py and channels to it. Methods return gigabytes per second."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "bench.kv.child", url, str(STORE_BYTES)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise ConfigError(f"no store at {redacted(url)}; the reason is above")
        keep_pages()
        self._runner = event_loop.runner()  # as the service's processes
        self._address = f"127.0.0.1:{int(line)}"
        self._channels: list[Any] = []
        self._clients: list[KvClient] = []  # kept, as workers keep theirs
        self._handles: list[KvHandle] = []

    def close(self) -> None:
        for each in self._channels:
            self._runner.run(each.close())
        self._runner.close()
        self._process.communicate("")

    def put(self, shape: Shape) -> float:
        """New objects, sealed; they stay for `get`."""
        self._open(shape.num_channels)
        clients = self._clients[: shape.num_channels]
        payload = secrets.token_bytes(shape.chunk_bytes)
        self._release()

        async def put(client: KvClient) -> KvHandle:
            async with client.put(shape.header()) as writer:
                for block in range(shape.num_chunks):
                    where = ChunkRange(block_start=block, num_blocks=1, layer_start=0, num_layers=1)
                    await writer.write(where, payload)
                return await writer.seal()

        took_s, self._handles = self._timed(*(put(client) for client in clients))
        return _gb(shape, took_s)

    def get(self, shape: Shape) -> float:
        """Every byte checked and copied to where the reader wants it."""
        clients = self._clients[: shape.num_channels]
        target = memoryview(bytearray(shape.chunk_bytes))

        async def get(client: KvClient, handle: KvHandle) -> None:
            async with aclosing(client.get(handle, "bench")) as chunks:
                async for _, payload in chunks:
                    target[:] = payload

        took_s, _ = self._timed(*(get(c, h) for c, h in zip(clients, self._handles, strict=True)))
        return _gb(shape, took_s)

    def raw_put(self, shape: Shape) -> float:
        """The same bytes in messages of the same size, which nobody checks or keeps."""
        payload = secrets.token_bytes(shape.chunk_bytes)

        async def put(stub: Any) -> None:
            call = stub.stream_unary(f"/{RAW}/Put")()
            for _ in range(shape.num_chunks):
                await call.write(payload)
            await call.done_writing()
            assert int.from_bytes(await call, "little") == shape.num_chunks * shape.chunk_bytes

        took_s, _ = self._timed(*(put(each) for each in self._open(shape.num_channels)))
        return _gb(shape, took_s)

    def raw_get(self, shape: Shape) -> float:
        request = shape.num_chunks.to_bytes(8, "little") + shape.chunk_bytes.to_bytes(8, "little")

        async def get(stub: Any) -> None:
            call, num_bytes = stub.unary_stream(f"/{RAW}/Get")(request), 0
            async for message in call:
                num_bytes += len(message)
            assert num_bytes == shape.num_chunks * shape.chunk_bytes

        took_s, _ = self._timed(*(get(each) for each in self._open(shape.num_channels)))
        return _gb(shape, took_s)

    def _open(self, count: int) -> list[Any]:
        async def more() -> None:
            while len(self._channels) < count:
                self._channels.append(channel(self._address))
                await self._channels[-1].channel_ready()
                self._clients.append(KvClient(self._channels[-1]))

        self._runner.run(more())
        return self._channels[:count]

    def _release(self) -> None:
        async def release() -> None:
            for handle in self._handles:
                await self._clients[0].release(handle)

        self._runner.run(release())
        self._handles = []

    def _timed(self, *work: Coroutine[Any, Any, Any]) -> tuple[float, list[Any]]:
        async def run() -> tuple[float, list[Any]]:
            began_s = time.perf_counter()
            results = await asyncio.gather(*work)
            return time.perf_counter() - began_s, results

        return self._runner.run(run())


@contextmanager
def peer(url: str) -> Iterator[Peer]:
    opened = Peer(url)
    try:
        yield opened
    finally:
        opened.close()


def memcpy(source: bytes, target: memoryview, shape: Shape) -> float:
    """Chunk by chunk from all over `source` into one warm chunk: what any reader has to do at least. Into a
    view, because a bytearray would take a copy of what is assigned to it first."""
    return _in_memory(source, target, shape, lambda chunk: None)


def memcpy_into(source: memoryview, target: memoryview, shape: Shape) -> float:
    """Chunk by chunk from one warm chunk to all over `target`, whose pages are there already: what any writer
    has to do at least."""
    began_s = time.perf_counter()
    for start in range(0, shape.num_bytes, shape.chunk_bytes):
        target[start : start + shape.chunk_bytes] = source
    return _gb(shape, time.perf_counter() - began_s)


def checked_copy(source: bytes, target: memoryview, shape: Shape) -> float:
    """The same with each chunk's hash before it is copied: what a reader that checks has to do at least."""
    return _in_memory(source, target, shape, xxhash.xxh3_128_digest)


def _in_memory(
    source: bytes, target: memoryview, shape: Shape, check: Callable[[memoryview], object]
) -> float:
    view, size = memoryview(source), shape.chunk_bytes
    began_s = time.perf_counter()
    for start in range(0, shape.num_bytes, size):
        chunk = view[start : start + size]
        check(chunk)
        target[:] = chunk
    return _gb(shape, time.perf_counter() - began_s)


def _gb(shape: Shape, took_s: float) -> float:
    return shape.num_channels * shape.num_chunks * shape.chunk_bytes / took_s / 1e9
