"""The decode worker's gRPC face: one stream per router, orders in, at most one message per step out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import grpc

from decode_worker.outbox import Key, Outbox
from decode_worker.sequence import DecodeSequence, Event, Started
from decode_worker.worker import DecodeWorker
from kvstore.key import KvHandle
from tandem.errors import FailedPrecondition, Internal, TandemError
from tandem.output import OutputDelta
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.work import Work, failure_to_pb

log = logging.getLogger(__name__)


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):
    """Hosts one `Session` per connected router."""

    def __init__(self, worker: DecodeWorker, fingerprint: bytes) -> None:
        self._worker = worker
        self._fingerprint = fingerprint

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.DecodeResponse]:
        session = Session(self._worker, self._fingerprint)
        reader = asyncio.ensure_future(session.read(request_iterator))
        try:
            while (news := await session.outbox.take()) is not None:
                yield _to_pb(news)
            await reader
        finally:
            reader.cancel()
            session.close()


class Session:
    """One router's requests on this worker. When the router goes, they go."""

    def __init__(self, worker: DecodeWorker, fingerprint: bytes) -> None:
        self._worker = worker
        self._fingerprint = fingerprint
        self._sequences: dict[Key, DecodeSequence] = {}
        self._prefetched: set[Key] = set()  # and not started
        self.outbox = Outbox()

    async def read(self, requests: AsyncIterator[pb.DecodeRequest]) -> None:
        """Take the router's orders until it hangs up."""
        try:
            async for request in requests:
                for order in request.orders or (request,):
                    self._obey(order)
        finally:
            self.outbox.close()

    def close(self) -> None:
        for sequence in self._sequences.values():
            self._worker.cancel(sequence)
        for key in self._prefetched:
            self._worker.cancel_prefetch(key)

    def _obey(self, order: pb.DecodeRequest) -> None:
        match order.WhichOneof("command"):
            case "start":
                self._start(order.start)
            case "prefetch":
                self._prefetch(order.prefetch)
            case "cancel":
                self._cancel((order.cancel.request_id, order.cancel.epoch))

    def _start(self, order: pb.StartDecode) -> None:
        key = (order.work.request_id, order.work.epoch)
        if key in self._sequences:
            log.warning("ignored a second order to decode %s, attempt %d", *key)
            return
        try:
            if order.work.fingerprint != self._fingerprint:
                raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
            work = Work.from_pb(order.work)
            handle = KvHandle.from_pb(order.handle) if order.HasField("handle") else None
            self._sequences[key] = self._worker.start(work, handle, self._emit)
            self._prefetched.discard(key)
        except TandemError as error:
            self._cancel(key)
            self.outbox.put([(key, error)])
        except Exception:  # one order must not end the others of this router
            self._cancel(key)
            bug = Internal.bug()
            log.exception("could not start %s (%s)", key[0], bug.error_id)
            self.outbox.put([(key, bug)])

    def _prefetch(self, order: pb.PrefetchKv) -> None:
        """An order that makes no sense is one to decode later, which says so."""
        with suppress(TandemError):
            work, handle = Work.from_pb(order.work), KvHandle.from_pb(order.handle)
            if work.fingerprint == self._fingerprint:
                self._prefetched.add(work.key)
                self._worker.prefetch(work, handle)

    def _cancel(self, key: Key) -> None:
        if key in self._prefetched:
            self._prefetched.discard(key)
            self._worker.cancel_prefetch(key)
        if sequence := self._sequences.pop(key, None):
            self._worker.cancel(sequence)

    def _emit(self, news: list[tuple[DecodeSequence, Event]]) -> None:
        told = [(sequence.work.key, event) for sequence, event in news]
        for key, event in told:
            if isinstance(event, TandemError) or (isinstance(event, OutputDelta) and event.finish):
                self._sequences.pop(key, None)
        self.outbox.put(told)


def _to_pb(news: list[tuple[Key, Event]]) -> pb.DecodeResponse:
    response = pb.DecodeResponse()
    for (request_id, epoch), event in news:
        message = response.events.add(request_id=request_id, epoch=epoch)
        match event:
            case OutputDelta():
                message.output.SetInParent()
                event.fill(message.output)
            case Started():
                message.started.CopyFrom(pb.DecodeStarted(**asdict(event)))
            case _:
                message.failed.CopyFrom(failure_to_pb(event))
    return response
