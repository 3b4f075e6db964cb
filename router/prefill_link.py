"""Prompts to one prefill worker, and what comes of them: over one stream, or with a call for each prompt to
workers of a version that knew no other way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from router.registry import WorkerInfo
from router.worker_stream import Heard, WorkerStream
from tandem.errors import TandemError, Unavailable
from tandem.internal import InternalPlane
from tandem.output import OutputDelta
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.rpc import to_tandem_error
from tandem.work import Work, failure_from_pb

GRACE_S = 1.0
PrefillNews = OutputDelta | pb.KvOpened | pb.KvSealed
OnPrefill = Callable[[PrefillNews], None]


def no_prefill() -> TandemError:
    """The prefill worker is lost or missing."""
    return Unavailable("NO_PREFILL", "no prefill worker is available; retry in 1000 ms", retry_after_ms=1000)


class PrefillLink:
    """Over one stream. `on_broken` hears that it is lost."""

    def __init__(self, info: WorkerInfo, plane: InternalPlane, on_broken: Callable[[], None]) -> None:
        self._channel = plane.channel(info.address)
        stub: Any = worker_pb2_grpc.PrefillServiceStub(self._channel)
        self._stream = WorkerStream(
            stub.StreamPrefill, _news, no_prefill, on_broken, takes_bundles=info.takes_bundles
        )

    async def prefill(self, work: Work, on_news: OnPrefill) -> None:
        """Tell `on_news`, of a long prompt, that its KV is on its way; the first token; unless that was the
        last, that the KV is in the store.

        Raises what the worker or `on_news` raised; `Unavailable(NO_PREFILL)` if the worker is lost. Being
        cancelled cancels the work, and gives up its KV.
        """
        start = pb.StreamPrefillRequest(start=work.to_pb())
        cancel = pb.CancelPrefill(request_id=work.request_id, epoch=work.epoch)
        await self._stream.follow(work.key, start, pb.StreamPrefillRequest(cancel=cancel), on_news)

    async def close(self) -> None:
        await self._stream.close()
        await self._channel.close()


class PrefillCalls:
    """The same with a call for each prompt. `on_broken` hears that the connection is lost."""

    def __init__(self, info: WorkerInfo, plane: InternalPlane, on_broken: Callable[[], None]) -> None:
        self._channel = plane.channel(info.address)
        self._on_broken = on_broken
        self._stub: Any = worker_pb2_grpc.PrefillServiceStub(self._channel)

    async def prefill(self, work: Work, on_news: OnPrefill) -> None:
        """As `PrefillLink.prefill`."""
        # The flight keeps the deadline and cancels; this limit is for the case that it cannot.
        limit_s = work.time_left_s() + GRACE_S
        call = self._stub.Prefill(pb.PrefillRequest(work=work.to_pb()), timeout=limit_s)
        try:
            async for response in call:
                if (news := _progress(response)) is not None:
                    on_news(news)
        except grpc.aio.AioRpcError as error:
            lost = no_prefill()
            meant = to_tandem_error(error, lost)
            if meant is lost and error.code() is grpc.StatusCode.UNAVAILABLE:
                self._on_broken()
            raise meant from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise no_prefill() from None  # the link was closed: the worker is lost
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


AnyPrefillLink = PrefillLink | PrefillCalls


def _news(event: pb.PromptEvent) -> Heard[PrefillNews]:
    match event.WhichOneof("event"):
        case "progress":
            news = _progress(event.progress)
            return Heard(news, _is_last(news))
        case "failed":
            return Heard(failure_from_pb(event.failed), True)
    return Heard(None, False)


def _progress(response: pb.PrefillResponse) -> PrefillNews | None:
    match response.WhichOneof("event"):
        case "first_token":
            return OutputDelta.from_pb(response.first_token)
        case "kv_opened":
            return response.kv_opened
        case "kv_sealed":
            return response.kv_sealed
    return None


def _is_last(news: PrefillNews | None) -> bool:
    if isinstance(news, OutputDelta):
        return news.finish is not None
    return isinstance(news, pb.KvSealed)


def _is_cancelled() -> bool:
    """Whether it is this task that was cancelled; gRPC reports a closed channel in the same way."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
