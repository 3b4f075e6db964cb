"""The prefill worker's gRPC face: one stream per router, or one call per prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from prefill_worker.job import Event
from prefill_worker.session import PrefillSession, accept, is_last, progress
from prefill_worker.worker import PrefillWorker
from tandem.errors import TandemError
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    """Passes prompts to the worker, and makes sure an abandoned one leaves nothing behind."""

    def __init__(self, worker: PrefillWorker, fingerprint: bytes) -> None:
        self._worker = worker
        self._fingerprint = fingerprint

    async def StreamPrefill(
        self,
        request_iterator: AsyncIterator[pb.StreamPrefillRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.StreamPrefillResponse]:
        session = PrefillSession(self._worker, self._fingerprint)
        reader = asyncio.ensure_future(session.read(request_iterator))
        try:
            while (events := await session.take()) is not None:
                yield pb.StreamPrefillResponse(events=events)
            await reader
        finally:
            reader.cancel()
            session.close()

    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.PrefillResponse]:
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = self._worker.submit(accept(request.work, self._fingerprint), events.put_nowait)
        try:
            is_over = False
            while not is_over:
                event = await events.get()
                is_over = is_last(event)
                if isinstance(event, TandemError):
                    raise event
                yield progress(job, event)
        except BaseException:  # cancelled, hung up or failed: nothing of the prompt may stay behind
            self._worker.cancel(job)
            raise
