"""One router's prompts on a prefill worker: orders in, news out, those of a prompt in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial

from kvstore.key import KvHandle
from prefill_worker.job import Event, KvOpened, PrefillJob
from prefill_worker.worker import PrefillWorker
from tandem.errors import FailedPrecondition, Internal, TandemError
from tandem.output import OutputDelta
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.work import Work, failure_to_pb

log = logging.getLogger(__name__)

Key = tuple[str, int]  # request id and attempt


def accept(order: pb.Work, fingerprint: bytes) -> Work:
    """The order, if it is for this build and makes sense; else raises `TandemError`."""
    if order.fingerprint != fingerprint:
        raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
    return Work.from_pb(order)


def progress(job: PrefillJob, event: OutputDelta | KvOpened | KvHandle) -> pb.PrefillResponse:
    """What the router is told of a prompt that goes well."""
    match event:
        case KvOpened():
            return pb.PrefillResponse(kv_opened=pb.KvOpened(handle=event.handle.to_pb()))
        case KvHandle():
            return pb.PrefillResponse(kv_sealed=pb.KvSealed(handle=event.to_pb(), send_ns=job.send_ns))
        case _:
            return pb.PrefillResponse(first_token=event.to_pb())


def is_last(event: Event) -> bool:
    """Whether nothing follows it."""
    match event:
        case OutputDelta():
            return event.finish is not None
        case _:
            return not isinstance(event, KvOpened)


class PrefillSession:
    """When the router goes, its prompts go. A prompt is its own until all of its news are sent: KV that is
    sealed, and of which it has not heard, is given up. Used on the event loop."""

    def __init__(self, worker: PrefillWorker, fingerprint: bytes) -> None:
        self._worker = worker
        self._fingerprint = fingerprint
        self._jobs: dict[Key, PrefillJob] = {}
        self._news: list[pb.PromptEvent] = []
        self._ended: list[Key] = []  # whose last news is among them
        self._sending: list[Key] = []  # whose last news was taken
        self._wake = asyncio.Event()
        self._is_closed = False

    async def read(self, requests: AsyncIterator[pb.StreamPrefillRequest]) -> None:
        """Take the router's orders until it hangs up."""
        try:
            async for request in requests:
                for order in request.orders or (request,):
                    self._obey(order)
        finally:
            self._is_closed = True
            self._wake.set()

    async def take(self) -> list[pb.PromptEvent] | None:
        """All that waits, at least one event; None once the router has hung up. What was taken before has
        been sent."""
        for key in self._sending:
            self._jobs.pop(key, None)
        self._sending = []
        await self._wake.wait()
        if self._is_closed:
            return None
        self._wake.clear()
        news, self._news = self._news, []
        self._sending, self._ended = self._ended, []
        return news

    def close(self) -> None:
        for job in self._jobs.values():
            self._worker.cancel(job)

    def _obey(self, order: pb.StreamPrefillRequest) -> None:
        match order.WhichOneof("command"):
            case "start":
                self._start(order.start)
            case "cancel":
                self._cancel((order.cancel.request_id, order.cancel.epoch))

    def _start(self, order: pb.Work) -> None:
        key = (order.request_id, order.epoch)
        if key in self._jobs:
            log.warning("ignored a second order to prefill %s, attempt %d", *key)
            return
        try:
            work = accept(order, self._fingerprint)
            self._jobs[key] = self._worker.submit(work, partial(self._tell, key))
        except TandemError as error:
            self._put(key, failed=failure_to_pb(error))
        except Exception:  # one order must not end the others of this router
            bug = Internal.bug()
            log.exception("could not start %s (%s)", key[0], bug.error_id)
            self._put(key, failed=failure_to_pb(bug))

    def _cancel(self, key: Key) -> None:
        if job := self._jobs.pop(key, None):
            self._worker.cancel(job)

    def _tell(self, key: Key, event: Event) -> None:
        job = self._jobs.get(key)
        if job is None:  # cancelled
            return
        if is_last(event):
            self._ended.append(key)
        if isinstance(event, TandemError):
            self._worker.cancel(job)
            self._put(key, failed=failure_to_pb(event))
        else:
            self._put(key, progress=progress(job, event))

    def _put(
        self, key: Key, progress: pb.PrefillResponse | None = None, failed: pb.WorkFailed | None = None
    ) -> None:
        request_id, epoch = key
        self._news.append(
            pb.PromptEvent(request_id=request_id, epoch=epoch, progress=progress, failed=failed)
        )
        self._wake.set()
