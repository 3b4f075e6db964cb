"""What a router's calls cost without a router: the same calls and messages for each stream, nothing else.

The difference between this server and a router is what the router itself does; the difference between this
one and the plain server is what gRPC takes for the calls to workers and the messages around the tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2, worker_pb2_grpc
from tandem.rpc import channel


class RelayServicer:
    """For each stream one order on the one stream to a prefill worker, and one on that to a decode worker."""

    def __init__(self, workers: str) -> None:
        self._channel = channel(workers)
        self._prefill: Any = worker_pb2_grpc.PrefillServiceStub(self._channel)
        self._decode: Any = worker_pb2_grpc.DecodeServiceStub(self._channel)
        self._prompts: asyncio.Queue[worker_pb2.StreamPrefillRequest] = asyncio.Queue()
        self._orders: asyncio.Queue[worker_pb2.DecodeRequest] = asyncio.Queue()
        self._listeners: dict[str, Callable[[Any], None]] = {}
        self._num_requests = 0

    async def run(self) -> None:
        """Orders out, news in; until cancelled."""
        streams = ((self._prefill.StreamPrefill(), self._prompts), (self._decode.Decode(), self._orders))
        await asyncio.gather(
            *(_send(call, orders) for call, orders in streams), *(self._read(call) for call, _ in streams)
        )

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        self._num_requests += 1
        work = _work(f"relayed-{self._num_requests}", request.input)
        yield pb.StreamGenerateResponse(admitted=pb.Admitted(request_id=work.request_id))
        events: asyncio.Queue[Any] = asyncio.Queue()
        self._listeners[work.request_id] = events.put_nowait
        try:
            self._prompts.put_nowait(worker_pb2.StreamPrefillRequest(start=work))
            yield _chunk(0, (await events.get()).progress.first_token)
            handle = (await events.get()).progress.kv_sealed.handle
            work.token_ids.append(0)
            order = worker_pb2.StartDecode(work=work, handle=handle)
            self._orders.put_nowait(worker_pb2.DecodeRequest(start=order))
            for position in range(1, work.sampling.max_tokens):
                while not (event := await events.get()).HasField("output"):
                    pass
                yield _chunk(position, event.output)
            yield pb.StreamGenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH))
        finally:
            del self._listeners[work.request_id]

    async def _read(self, call: Any) -> None:
        async for response in call:
            for event in response.events:
                if (listener := self._listeners.get(event.request_id)) is not None:
                    listener(event)


async def _send(call: Any, orders: asyncio.Queue[Any]) -> None:
    while True:
        first = await orders.get()
        several = [first, *(orders.get_nowait() for _ in range(orders.qsize()))]
        await call.write(type(first)(orders=several) if several[1:] else first)


def _work(request_id: str, asked: pb.GenerationInput) -> worker_pb2.Work:
    return worker_pb2.Work(
        request_id=request_id,
        epoch=1,
        token_ids=asked.token_ids.ids,
        num_prompt_tokens=len(asked.token_ids.ids),
        sampling=asked.sampling,
    )


def _chunk(position: int, delta: worker_pb2.OutputDelta) -> pb.StreamGenerateResponse:
    chunk = pb.TokenChunk(position=position, token_ids=delta.token_ids, text=delta.text)
    return pb.StreamGenerateResponse(token_chunk=chunk)
