"""The other processes of the measurement: null workers, and servers of the stream that are no router.

    python -m bench.streams.child workers ROUTER_ADDRESS STEPS_PER_S CONFIG
    python -m bench.streams.child null STEPS_PER_S      the same without a router to register with
    python -m bench.streams.child relay WORKERS_ADDRESS
    python -m bench.streams.child plain STEPS_PER_S

Says its port in one line (workers: 0, once they have registered) and serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc

from bench.streams.null_worker import TEXT, TOKEN, NullDecode, NullPrefill, start_workers
from bench.streams.relay import RelayServicer
from tandem import event_loop, rpc
from tandem.config import ClusterConfig
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc

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


async def serve_streams(servicer: PlainServicer | RelayServicer, beside: Coroutine[Any, Any, None]) -> None:
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.StreamGenerate,
        request_deserializer=pb.StreamGenerateRequest.FromString,
        response_serializer=pb.StreamGenerateResponse.SerializeToString,
    )
    server = grpc.aio.server(options=rpc.PENDING)
    service = grpc.method_handlers_generic_handler(SERVICE, {"StreamGenerate": handler})
    server.add_generic_rpc_handlers((service,))
    task = asyncio.ensure_future(beside)
    await _serve(server)
    task.cancel()


async def serve_null(steps_per_s: float) -> None:
    server = rpc.server(public=False)
    worker_pb2_grpc.add_PrefillServiceServicer_to_server(NullPrefill(), server)
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(NullDecode(steps_per_s), server)
    await _serve(server)


async def serve_workers(router: str, steps_per_s: float, config: ClusterConfig) -> None:
    hosts = await start_workers(config, router, steps_per_s)
    print(0, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for host in hosts:
        await host.stop(0)


async def _serve(server: grpc.aio.Server) -> None:
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


async def serve(kind: str, *rest: str) -> None:
    match kind:
        case "workers":
            await serve_workers(rest[0], float(rest[1]), ClusterConfig.from_json(rest[2]))
        case "null":
            await serve_null(float(rest[0]))
        case "relay":
            relay = RelayServicer(rest[0])
            await serve_streams(relay, relay.run())
        case "plain":
            plain = PlainServicer(float(rest[0]))
            await serve_streams(plain, plain.tick())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        event_loop.run(serve(*sys.argv[1:]))
