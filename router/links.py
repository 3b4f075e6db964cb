"""The router's connections: one per worker, opened and closed as workers come and go, and the store's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import grpc

from router.registry import Registry, WorkerInfo, WorkerRole
from tandem.errors import TandemError, Unavailable, error_from_reason
from tandem.internal import InternalPlane
from tandem.output import OutputDelta
from tandem.pb.kv.v1 import kv_pb2, kv_pb2_grpc
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.rpc import to_tandem_error
from tandem.work import Work, work_id

log = logging.getLogger(__name__)

FORGET_TIMEOUT_S = 2.0
GRACE_S = 1.0
PrefillEvent = OutputDelta | pb.KvOpened | pb.KvSealed
OnDecode = Callable[[pb.DecodeStarted | OutputDelta], None]


def no_prefill() -> TandemError:
    """The prefill worker is lost or missing."""
    return Unavailable("NO_PREFILL", "no prefill worker is available; retry in 1000 ms", retry_after_ms=1000)


def no_decode() -> TandemError:
    """The decode worker is lost or missing."""
    return Unavailable("NO_DECODE", "no decode worker is available; retry in 1000 ms", retry_after_ms=1000)


def _is_cancelled() -> bool:
    """Whether it is this task that was cancelled; gRPC reports a closed channel in the same way."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class PrefillLink:
    """Calls one prefill worker. `on_broken` hears that its connection is lost."""

    def __init__(self, info: WorkerInfo, plane: InternalPlane, on_broken: Callable[[], None]) -> None:
        self._channel = plane.channel(info.address)
        self._on_broken = on_broken
        self._stub: Any = worker_pb2_grpc.PrefillServiceStub(self._channel)

    async def prefill(self, work: Work) -> AsyncGenerator[PrefillEvent]:
        """Of a long prompt, that its KV is on its way; the first token; unless that was the last, that the KV
        is in the store.

        Raises what the worker raised; `Unavailable(NO_PREFILL)` if it is lost.
        """
        # The flight keeps the deadline and cancels; this limit is for the case that it cannot.
        limit_s = work.time_left_s() + GRACE_S
        call = self._stub.Prefill(pb.PrefillRequest(work=work.to_pb()), timeout=limit_s)
        try:
            async for response in call:
                match response.WhichOneof("event"):
                    case "first_token":
                        yield OutputDelta.from_pb(response.first_token)
                    case "kv_opened":
                        yield response.kv_opened
                    case "kv_sealed":
                        yield response.kv_sealed
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


class _Listener:
    """Who wants the news of one attempt. It is told from the reading task itself: at thousands of tokens a
    second, a queue and a task between the worker's stream and the client's would cost more than they do."""

    def __init__(self, on_event: OnDecode) -> None:
        self._on_event = on_event
        self.last: asyncio.Future[OutputDelta] = asyncio.get_running_loop().create_future()
        self.is_over = False  # on the worker

    def hear(self, event: pb.SequenceEvent) -> None:
        """Pass it on; an error of the listener's own ends only this attempt."""
        if self.last.done():
            return
        try:
            match event.WhichOneof("event"):
                case "output":
                    self._hear_output(OutputDelta.from_pb(event.output))
                case "started":
                    self._on_event(event.started)
                case "failed":
                    self.end(_failure(event.failed))
        except Exception as error:
            self.last.set_exception(error)

    def end(self, error: TandemError) -> None:
        """Nothing more will be heard."""
        self.is_over = True
        if not self.last.done():
            self.last.set_exception(error)
            self.last.exception()  # seen, even if the one who waits is cancelled this very moment

    def _hear_output(self, delta: OutputDelta) -> None:
        self._on_event(delta)
        if delta.finish is not None:
            self.is_over = True
            self.last.set_result(delta)


def _failure(failed: pb.WorkFailed) -> TandemError:
    """As the worker raised it, with the id under which its log has more."""
    error = error_from_reason(failed.reason, failed.message)
    error.error_id = failed.error_id or error.error_id
    return error


class DecodeLink:
    """The one stream to a decode worker: orders out, news in, sorted by request."""

    def __init__(
        self, info: WorkerInfo, router_id: str, plane: InternalPlane, on_broken: Callable[[], None]
    ) -> None:
        self._channel = plane.channel(info.address)
        self._on_broken = on_broken
        self._orders: asyncio.Queue[pb.DecodeRequest] = asyncio.Queue()
        self._orders.put_nowait(pb.DecodeRequest(open=pb.OpenSession(router_id=router_id)))
        self._listeners: dict[tuple[str, int], _Listener] = {}
        self.num_stale_events = 0  # news of attempts nobody waits for any more
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def decode(self, work: Work, handle: kv_pb2.KvHandle | None, on_event: OnDecode) -> OutputDelta:
        """Tell `on_event` that the KV is in place, then of the tokens after the last of `work.token_ids`, as
        they are read; returns the last of them.

        Without a handle the worker computes them itself. Raises what the worker or `on_event` raised;
        `Unavailable(NO_DECODE)` if the worker is lost. Being cancelled cancels the work.
        """
        if self._task.done():
            raise no_decode()
        listener = self._listeners[work.key] = _Listener(on_event)
        self._orders.put_nowait(pb.DecodeRequest(start=pb.StartDecode(work=work.to_pb(), handle=handle)))
        try:
            return await listener.last
        finally:
            del self._listeners[work.key]
            if not listener.is_over:
                self.cancel(work)

    def prefetch(self, work: Work, handle: kv_pb2.KvHandle) -> None:
        """Let the worker fetch KV that is still being computed; `decode` or `cancel` follows."""
        self._orders.put_nowait(pb.DecodeRequest(prefetch=pb.PrefetchKv(work=work.to_pb(), handle=handle)))

    def cancel(self, work: Work) -> None:
        cancel = pb.CancelDecode(request_id=work.request_id, epoch=work.epoch)
        self._orders.put_nowait(pb.DecodeRequest(cancel=cancel))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._channel.close()

    async def _run(self) -> None:
        stub: Any = worker_pb2_grpc.DecodeServiceStub(self._channel)
        call = stub.Decode()
        sending = asyncio.get_running_loop().create_task(self._send(call))
        try:
            async for response in call:
                for event in response.events:
                    self._deliver(event)
        except grpc.aio.AioRpcError as error:
            log.warning("lost a decode worker: %s", error.code().name)
        except Exception:
            log.exception("cannot read a decode worker's news")
        finally:
            call.cancel()
            sending.cancel()
            for listener in self._listeners.values():
                listener.end(no_decode())
        self._on_broken()

    async def _send(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reading side says why
            while True:
                await call.write(await self._orders.get())

    def _deliver(self, event: pb.SequenceEvent) -> None:
        listener = self._listeners.get((event.request_id, event.epoch))
        if listener is None:
            self.num_stale_events += 1
        else:
            listener.hear(event)


class StoreLink:
    """Gives up KV that no decode worker will fetch, whether or not its handle has arrived."""

    def __init__(self, address: str, router_id: str, plane: InternalPlane) -> None:
        self._channel = plane.channel(address)
        self._router_id = router_id
        self._stub: Any = kv_pb2_grpc.KvServiceStub(self._channel)

    async def forget(self, request_id: str, tenant: str, epoch: int) -> None:
        """Best effort: what this call misses, the lease frees."""
        name = work_id(request_id, self._router_id)
        attempt = kv_pb2.ForgetKvRequest(request_id=name, tenant=tenant, epoch=epoch)
        try:
            await self._stub.ForgetKv(attempt, timeout=FORGET_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.warning("could not give up stored KV: %s", to_tandem_error(error).reason)

    async def close(self) -> None:
        await self._channel.close()


class WorkerLinks:
    """Follows the registry: a link for each worker it knows."""

    def __init__(self, registry: Registry, router_id: str, plane: InternalPlane) -> None:
        self.router_id = router_id
        self._registry = registry
        self._plane = plane
        self._links: dict[tuple[str, str], PrefillLink | DecodeLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        registry.subscribe(on_join=self._open, on_loss=self._close)

    def prefill(self, info: WorkerInfo | None) -> PrefillLink:
        link = self._links.get((info.worker_id, info.incarnation)) if info else None
        if not isinstance(link, PrefillLink):
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
        key = (info.worker_id, info.incarnation)
        if info.role is WorkerRole.PREFILL:
            self._links[key] = PrefillLink(info, self._plane, lambda: self._broken(info))
        else:
            self._links[key] = DecodeLink(info, self.router_id, self._plane, lambda: self._broken(info))

    def _broken(self, info: WorkerInfo) -> None:
        self._registry.lose(info.worker_id, info.incarnation)

    def _close(self, info: WorkerInfo) -> None:
        if link := self._links.pop((info.worker_id, info.incarnation), None):
            task = asyncio.get_running_loop().create_task(link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
