"""The prefill worker's gRPC face: one call per prompt, its first token and its KV handle streamed back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvstore.key import KvHandle
from prefill_worker.job import Event, KvOpened
from prefill_worker.worker import PrefillWorker
from tandem.errors import FailedPrecondition, TandemError
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.work import Work


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    """Passes prompts to the worker, and makes sure an abandoned one leaves nothing behind."""

    def __init__(self, worker: PrefillWorker, fingerprint: bytes) -> None:
        self._worker = worker
        self._fingerprint = fingerprint

    async def Prefill(
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.PrefillResponse]:
        if request.work.fingerprint != self._fingerprint:
            raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = self._worker.submit(Work.from_pb(request.work), events.put_nowait)
        try:
            while True:
                event = await events.get()
                if isinstance(event, TandemError):
                    raise event
                if isinstance(event, KvOpened):
                    yield pb.PrefillResponse(kv_opened=pb.KvOpened(handle=event.handle.to_pb()))
                    continue
                if isinstance(event, KvHandle):
                    sealed = pb.KvSealed(handle=event.to_pb(), send_ns=job.send_ns)
                    yield pb.PrefillResponse(kv_sealed=sealed)
                    return
                yield pb.PrefillResponse(first_token=event.to_pb())
                if event.finish is not None:
                    return
        except BaseException:  # cancelled, hung up or failed: nothing of the prompt may stay behind
            self._worker.cancel(job)
            raise
