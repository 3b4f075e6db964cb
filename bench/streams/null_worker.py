"""Workers that compute nothing: they speak the real protocol to a real router, with made-up tokens in time.

A prefill worker answers at once; a decode worker gives all its sequences a token per step, as one message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from tandem.config import ClusterConfig
from tandem.fingerprint import model_fingerprint
from tandem.internal import InternalPlane
from tandem.ledger import Ledger
from tandem.pb.kv.v1 import kv_pb2
from tandem.pb.v1 import generation_pb2
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.registration import WorkerLoad
from tandem.worker_host import WorkerHost

NUM_BLOCKS = 1 << 20
TOKEN, TEXT = 7, " word"


class NullPrefill(worker_pb2_grpc.PrefillServiceServicer):
    """The first token and a handle that nobody will look behind, in two messages as of a real worker."""

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> AsyncIterator[pb.PrefillResponse]:
        for progress in _prefilled(request.work):
            yield progress

    async def StreamPrefill(
        self, request_iterator: AsyncIterator[pb.StreamPrefillRequest], context: Any
    ) -> AsyncIterator[pb.StreamPrefillResponse]:
        async for request in request_iterator:
            for work in (order.start for order in request.orders or (request,) if order.HasField("start")):
                for progress in _prefilled(work):
                    event = pb.PromptEvent(request_id=work.request_id, epoch=work.epoch, progress=progress)
                    yield pb.StreamPrefillResponse(events=[event])


def _prefilled(work: pb.Work) -> tuple[pb.PrefillResponse, pb.PrefillResponse]:
    handle = kv_pb2.KvHandle(
        object_id=bytes(16),
        epoch=work.epoch,
        num_tokens=len(work.token_ids),
        fingerprint=work.fingerprint,
    )
    return (
        pb.PrefillResponse(first_token=pb.OutputDelta(token_ids=[TOKEN], text=TEXT)),
        pb.PrefillResponse(kv_sealed=pb.KvSealed(handle=handle)),
    )


@dataclass(slots=True)
class _Sequence:
    request_id: str
    epoch: int
    num_left: int  # tokens


class NullDecode(worker_pb2_grpc.DecodeServiceServicer):
    """`steps_per_s` messages a second, each with a token for every sequence."""

    def __init__(self, steps_per_s: float) -> None:
        self._step_s = 1 / steps_per_s

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: Any
    ) -> AsyncIterator[pb.DecodeResponse]:
        sequences: dict[tuple[str, int], _Sequence] = {}
        started: list[pb.SequenceEvent] = []
        reader = asyncio.ensure_future(self._read(request_iterator, sequences, started))
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        try:
            while not reader.done():
                next_s = max(next_s + self._step_s, loop.time())
                await asyncio.sleep(next_s - loop.time())
                events = started + [_token(sequence) for sequence in sequences.values()]
                started.clear()
                for key in [key for key, sequence in sequences.items() if not sequence.num_left]:
                    del sequences[key]
                if events:
                    yield pb.DecodeResponse(events=events)
        finally:
            reader.cancel()

    @staticmethod
    async def _read(
        requests: AsyncIterator[pb.DecodeRequest],
        sequences: dict[tuple[str, int], _Sequence],
        started: list[pb.SequenceEvent],
    ) -> None:
        async for order in _orders(requests):
            match order.WhichOneof("command"):
                case "start":
                    work = order.start.work
                    given = len(work.token_ids) - work.num_prompt_tokens
                    sequence = _Sequence(work.request_id, work.epoch, work.sampling.max_tokens - given)
                    sequences[sequence.request_id, sequence.epoch] = sequence
                    started.append(_event(sequence, started=pb.DecodeStarted()))
                case "cancel":
                    sequences.pop((order.cancel.request_id, order.cancel.epoch), None)


async def _orders(requests: AsyncIterator[pb.DecodeRequest]) -> AsyncIterator[pb.DecodeRequest]:
    async for request in requests:
        for order in request.orders or (request,):
            yield order


def _event(sequence: _Sequence, **what: Any) -> pb.SequenceEvent:
    return pb.SequenceEvent(request_id=sequence.request_id, epoch=sequence.epoch, **what)


def _token(sequence: _Sequence) -> pb.SequenceEvent:
    sequence.num_left -= 1
    is_last = not sequence.num_left
    finish = generation_pb2.FINISH_REASON_LENGTH if is_last else generation_pb2.FINISH_REASON_UNSPECIFIED
    return _event(sequence, output=pb.OutputDelta(token_ids=[TOKEN], text=TEXT, finish_reason=finish))


async def start_workers(config: ClusterConfig, router: str, steps_per_s: float) -> list[WorkerHost]:
    """One of each kind, registered with the router at this address."""
    prefill, decode = NullPrefill(), NullDecode(steps_per_s)
    return [
        await _start(
            config,
            router,
            pb.WORKER_ROLE_PREFILL,
            lambda server: worker_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server),
        ),
        await _start(
            config,
            router,
            pb.WORKER_ROLE_DECODE,
            lambda server: worker_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server),
        ),
    ]


async def _start(
    config: ClusterConfig, router: str, role: pb.WorkerRole.ValueType, add: Callable[[grpc.aio.Server], None]
) -> WorkerHost:
    host, name = WorkerHost(router, InternalPlane.of(config)), f"null-{role}"
    info = pb.WorkerInfo(
        worker_id=name,
        role=role,
        fingerprint=model_fingerprint(config),
        block_size=config.cache.block_size,
        num_blocks=NUM_BLOCKS,
        block_bytes=1,
        streams_prefill=role == pb.WORKER_ROLE_PREFILL,
        takes_bundles=True,
    )
    await host.start(info, add, WorkerLoad, Ledger(name, "blocks", NUM_BLOCKS).audit)
    return host
