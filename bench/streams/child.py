"""The other processes of the measurement: a router's null workers, or a plain gRPC server of the stream.

    python -m bench.streams.child workers ROUTER_ADDRESS STEPS_PER_S CONFIG
    python -m bench.streams.child plain STEPS_PER_S

Says its port in one line (workers: 0, once they have registered) and serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc

from bench.streams.null_worker import TEXT, TOKEN, start_workers
from tandem.config import ClusterConfig
from tandem.pb.v1 import generation_pb2 as pb

SERVICE = "tandem.v1.GenerationService"


class PlainServicer:
    """What a stream costs with nothing behind it: every handler waits for the step and yields a chunk."""

    def __init__(self, steps_per_s: float) -> None:
        self._step_s = 1 / steps_per_s
        self._step = asyncio.Event()

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        for position in range(request.input.sampling.max_tokens):
            await self._step.wait()
            chunk = pb.TokenChunk(position=position, token_ids=[TOKEN], text=TEXT)
            yield pb.StreamGenerateResponse(token_chunk=chunk)

    async def tick(self) -> None:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        while True:
            next_s = max(next_s + self._step_s, loop.time())
            await asyncio.sleep(next_s - loop.time())
            step, self._step = self._step, asyncio.Event()
            step.set()


async def serve_plain(steps_per_s: float) -> None:
    server, servicer = grpc.aio.server(), PlainServicer(steps_per_s)
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.StreamGenerate,
        request_deserializer=pb.StreamGenerateRequest.FromString,
        response_serializer=pb.StreamGenerateResponse.SerializeToString,
    )
    service = grpc.method_handlers_generic_handler(SERVICE, {"StreamGenerate": handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ticking = asyncio.ensure_future(servicer.tick())
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    ticking.cancel()
    await server.stop(0)


async def serve_workers(router: str, steps_per_s: float, config: ClusterConfig) -> None:
    hosts = await start_workers(config, router, steps_per_s)
    print(0, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for host in hosts:
        await host.stop(0)


def main() -> None:
    kind, *rest = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        if kind == "plain":
            asyncio.run(serve_plain(float(rest[0])))
        else:
            asyncio.run(serve_workers(rest[0], float(rest[1]), ClusterConfig.from_json(rest[2])))


if __name__ == "__main__":
    main()
