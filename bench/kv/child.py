"""The other side of the measurement, a process of its own: a KV store, and a service that moves plain bytes.

    python -m bench.kv.child URL STORE_BYTES

Says its port in one line and serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvstore.server import KvServicer, add_to_server
from kvstore.store import KvStore
from kvstore.sweeper import Sweeper
from kvstore.urls import backend_from_url
from tandem import event_loop
from tandem.allocator import keep_pages
from tandem.rpc import bind, server

RAW = "bench.Raw"


class RawServicer:
    """Streams of bytes without any checks, as fast as gRPC for Python goes."""

    async def Put(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        num_bytes = 0
        async for message in requests:
            num_bytes += len(message)
        return num_bytes.to_bytes(8, "little")

    async def Get(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        num_messages, size = (int.from_bytes(part, "little") for part in (request[:8], request[8:]))
        message = bytes(size)
        for _ in range(num_messages):
            yield message


def add_raw(raw: RawServicer, to: grpc.aio.Server) -> None:
    handlers: dict[str, Any] = {
        "Put": grpc.stream_unary_rpc_method_handler(raw.Put),
        "Get": grpc.unary_stream_rpc_method_handler(raw.Get),
    }
    to.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RAW, handlers),))


async def serve(url: str, store_bytes: int) -> None:
    keep_pages()
    store = KvStore(backend_from_url(url), store_bytes)
    host = server(public=False)
    add_to_server(KvServicer(store), host)
    add_raw(RawServicer(), host)
    port = bind(host, "127.0.0.1", 0)
    await host.start()
    print(port, flush=True)
    async with Sweeper(store):
        await asyncio.to_thread(sys.stdin.read)
    await host.stop(None)
    await asyncio.to_thread(store.close)


if __name__ == "__main__":
    event_loop.run(serve(sys.argv[1], int(sys.argv[2])))
