"""Writes one object: reserve on entering, chunks in any order of ranges, then the seal.

    async with client.put(header) as writer:
        await writer.write(ChunkRange(...), payload)
        handle = await writer.seal()

Leaving without a seal aborts, and the store frees the bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from kvstore.digest import ObjectDigest
from kvstore.key import Buffer, KvHandle
from kvstore.link import FILE, MAY_PLACE, RESERVED, Ending, connected, store_errors
from kvstore.mapping import Mappings
from kvstore.placer import Placer
from kvstore.records import ChunkHeader, ChunkRange, ObjectHeader, Record, Seal
from kvstore.wire import encode
from tandem.pb.kv.v1 import kv_pb2 as pb

T = TypeVar("T")
PUT_KV = "/tandem.kv.v1.KvService/PutKv"


class KvWriter:
    """One put. `idle_s` bounds each wait for the store. `handle` names the object once it is reserved. With
    `files` it is written where it will lie, if store and writer share a host."""

    handle: KvHandle
    busy_s = 0.0  # spent on bringing it to the store

    def __init__(
        self, channel: grpc.aio.Channel, header: ObjectHeader, idle_s: float, files: Mappings | None = None
    ) -> None:
        self._channel = channel
        self._files = files
        self._header = header
        self._idle_s = idle_s
        self._digest = ObjectDigest(header)
        self._digests: list[bytes] = []
        self._call: Any = None
        self._ending: Ending
        self._placer: Placer | None = None  # None: the bytes cross gRPC

    async def __aenter__(self) -> Self:
        """Returns when the store has reserved the bytes; raises its refusal otherwise."""
        await connected(self._channel)
        put: Any = self._channel.stream_unary(PUT_KV, response_deserializer=pb.PutKvResponse.FromString)
        self._call = put(metadata=((MAY_PLACE, "1"),) if self._files and self._files.are_here else None)
        self._ending = Ending(self._call)
        try:
            await self._send(self._header)
            metadata = dict(await self._within(self._call.initial_metadata()))
            if RESERVED not in metadata:
                await self._within(self._answer())
            self.handle = self._header.handle(int(metadata[RESERVED]))
            self._placer = self._placer_in(metadata.get(FILE))
        except BaseException:
            self.abort()
            raise
        return self

    async def write(self, where: ChunkRange, payload: Buffer) -> None:
        """Send one chunk, [num_blocks, num_layers, 2, block_size, kv_heads, head_dim] in raw bytes. What the
        store says of it may be raised by a later call."""
        digest = self._digest.chunk(len(self._digests), where, payload)
        chunk = ChunkHeader(
            block_start=where.block_start,
            num_blocks=where.num_blocks,
            layer_start=where.layer_start,
            num_layers=where.num_layers,
            index=len(self._digests),
            length=memoryview(payload).nbytes,
            digest=digest,
        )
        began_s = time.perf_counter()
        if self._placer is None:
            await self._send(chunk, payload)
        else:
            await self._placer.write(chunk, payload)
        self.busy_s += time.perf_counter() - began_s
        self._digests.append(digest)

    async def seal(self) -> KvHandle:
        """Complete the object. From here on it is the store's."""
        seal = Seal(num_chunks=len(self._digests), total_digest=self._digest.total(self._digests))
        began_s = time.perf_counter()
        if self._placer is not None:
            await self._placer.settle()
        await self._send(seal)
        response = await self._within(self._answer())
        self.busy_s += time.perf_counter() - began_s
        return KvHandle.from_pb(response.handle)

    def abort(self) -> None:
        """Give the put up, unless it is over."""
        if self._placer is not None:
            self._placer.close()
        self._call.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _placer_in(self, path: str | None) -> Placer | None:
        """Fills the file, if there is one that can be mapped here."""
        if path is None or self._files is None:
            return None
        view = self._files.view(path, self._header.most_message_bytes)
        self._files.are_here = view is not None
        return Placer(view, self._send) if view is not None else None

    async def _send(self, record: Record, payload: Buffer = b"") -> None:
        await self._within(self._write(encode(record, payload)))

    async def _write(self, message: bytes) -> None:
        try:
            await self._call.write(message)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._answer()  # the store has ended the call; this raises its reason
            raise

    async def _answer(self) -> pb.PutKvResponse:
        try:
            response: pb.PutKvResponse = await self._call
        except grpc.aio.AioRpcError as error:
            raise self._ending.error or error from None
        return response

    async def _within(self, answer: Awaitable[T]) -> T:
        with store_errors():
            async with asyncio.timeout(self._idle_s):
                return await answer
