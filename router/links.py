"""The router's connections: one per worker, opened and closed as workers come and go, and the store's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from router.prefill_link import AnyPrefillLink, PrefillCalls, PrefillLink, no_prefill
from router.registry import Registry, WorkerInfo, WorkerRole
from router.worker_stream import Heard, WorkerStream
from tandem.errors import TandemError, Unavailable
from tandem.internal import InternalPlane
from tandem.output import OutputDelta
from tandem.pb.kv.v1 import kv_pb2, kv_pb2_grpc
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.request import Request
from tandem.rpc import to_tandem_error
from tandem.work import Work, failure_from_pb, work_id

log = logging.getLogger(__name__)

FORGET_TIMEOUT_S = 6.0  # a store may be without a processor for seconds, or starting again
DecodeNews = pb.DecodeStarted | OutputDelta
OnDecode = Callable[[DecodeNews], None]


def no_decode() -> TandemError:
    """The decode worker is lost or missing."""
    return Unavailable("NO_DECODE", "no decode worker is available; retry in 1000 ms", retry_after_ms=1000)


class DecodeLink:
    """Orders to one decode worker, and what comes of them."""

    def __init__(
        self, info: WorkerInfo, router_id: str, plane: InternalPlane, on_broken: Callable[[], None]
    ) -> None:
        self._channel = plane.channel(info.address)
        stub: Any = worker_pb2_grpc.DecodeServiceStub(self._channel)
        self._stream = WorkerStream(
            stub.Decode, _decode_news, no_decode, on_broken, takes_bundles=info.takes_bundles
        )
        self._stream.send(pb.DecodeRequest(open=pb.OpenSession(router_id=router_id)))

    async def decode(self, work: Work, handle: kv_pb2.KvHandle | None, on_news: OnDecode) -> OutputDelta:
        """Tell `on_news` that the KV is in place, then of the tokens after the last of `work.token_ids`, as
        they are read; returns the last of them.

        Without a handle the worker computes them itself. Raises what the worker or `on_news` raised;
        `Unavailable(NO_DECODE)` if the worker is lost. Being cancelled cancels the work.
        """
        start = pb.DecodeRequest(start=pb.StartDecode(work=work.to_pb(), handle=handle))
        last = await self._stream.follow(work.key, start, _cancel_decode(work), on_news)
        assert isinstance(last, OutputDelta)
        return last

    def prefetch(self, work: Work, handle: kv_pb2.KvHandle) -> None:
        """Let the worker fetch KV that is still being computed; `decode` or `cancel` follows."""
        self._stream.send(pb.DecodeRequest(prefetch=pb.PrefetchKv(work=work.to_pb(), handle=handle)))

    def cancel(self, work: Work) -> None:
        self._stream.send(_cancel_decode(work))

    async def close(self) -> None:
        await self._stream.close()
        await self._channel.close()


def _cancel_decode(work: Work) -> pb.DecodeRequest:
    return pb.DecodeRequest(cancel=pb.CancelDecode(request_id=work.request_id, epoch=work.epoch))


def _decode_news(event: pb.SequenceEvent) -> Heard[DecodeNews]:
    match event.WhichOneof("event"):
        case "output":
            delta = OutputDelta.from_pb(event.output)
            return Heard(delta, delta.finish is not None)
        case "started":
            return Heard(event.started, False)
        case "failed":
            return Heard(failure_from_pb(event.failed), True)
    return Heard(None, False)


class StoreLink:
    """Gives up KV that no decode worker will fetch, whether or not its handle has arrived."""

    def __init__(self, address: str, router_id: str, plane: InternalPlane) -> None:
        self._channel = plane.channel(address)
        self._router_id = router_id
        self._stub: Any = kv_pb2_grpc.KvServiceStub(self._channel)
        self._calls: set[asyncio.Task[None]] = set()

    def forget(self, request: Request, epoch: int) -> None:
        """Say in the background that nobody will fetch what this attempt stores; else its lease frees it."""
        name = work_id(request.request_id, self._router_id)
        attempt = kv_pb2.ForgetKvRequest(request_id=name, tenant=request.tenant, epoch=epoch)
        task = asyncio.get_running_loop().create_task(self._forget(attempt))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def settle(self) -> None:
        """Until everything has been said."""
        if self._calls:
            await asyncio.wait(self._calls)

    async def close(self) -> None:
        await self._channel.close()

    async def _forget(self, attempt: kv_pb2.ForgetKvRequest) -> None:
        try:
            await self._stub.ForgetKv(attempt, timeout=FORGET_TIMEOUT_S, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            log.warning("could not give up stored KV: %s", to_tandem_error(error).reason)


class WorkerLinks:
    """Follows the registry: a link for each worker it knows."""

    def __init__(self, registry: Registry, router_id: str, plane: InternalPlane) -> None:
        self.router_id = router_id
        self._registry = registry
        self._plane = plane
        self._links: dict[tuple[str, str], AnyPrefillLink | DecodeLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        registry.subscribe(on_join=self._open, on_loss=self._close)

    def prefill(self, info: WorkerInfo | None) -> AnyPrefillLink:
        link = self._links.get((info.worker_id, info.incarnation)) if info else None
        if link is None or isinstance(link, DecodeLink):
            raise no_prefill()
        return link

    def decode(self, info: WorkerInfo) -> DecodeLink:
        link = self._links.get((info.worker_id, info.incarnation))
        if not isinstance(link, DecodeLink):
            raise no_decode()
        return link

    async def close(self) -> None:
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links), *self._closing)

    def _open(self, info: WorkerInfo) -> None:
        self._links[info.worker_id, info.incarnation] = self._link_to(info)

    def _link_to(self, info: WorkerInfo) -> AnyPrefillLink | DecodeLink:
        def on_broken() -> None:
            self._registry.lose(info.worker_id, info.incarnation)

        if info.role is WorkerRole.DECODE:
            return DecodeLink(info, self.router_id, self._plane, on_broken)
        make = PrefillLink if info.streams_prefill else PrefillCalls
        return make(info, self._plane, on_broken)

    def _close(self, info: WorkerInfo) -> None:
        if link := self._links.pop((info.worker_id, info.incarnation), None):
            task = asyncio.get_running_loop().create_task(link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
