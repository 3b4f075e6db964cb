"""The store as workers see it. Every failure is a `TandemError`; a store that is gone is STORE_DOWN."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

import grpc

from kvstore.key import Buffer, KvHandle
from kvstore.link import FILE, MAY_MAP, connected, drop, store_errors
from kvstore.mapping import FillingFile, MappedObject, Mappings
from kvstore.objects import ObjectStat, ObjectState
from kvstore.reader import ReadCheck
from kvstore.records import ChunkHeader, ObjectHeader
from kvstore.wire import reaches
from kvstore.writer import KvWriter
from tandem.config import KvStoreConfig
from tandem.errors import DataLoss, TandemError
from tandem.pb.kv.v1 import kv_pb2 as pb
from tandem.pb.kv.v1 import kv_pb2_grpc

UNARY_S = 5.0
FOLLOW_KV = "/tandem.kv.v1.KvService/FollowKv"
GET_KV = "/tandem.kv.v1.KvService/GetKv"
T = TypeVar("T")


class KvClient:
    """Puts, gets and gives up objects over one channel (`tandem.rpc.channel`)."""

    def __init__(self, channel: grpc.aio.Channel, config: KvStoreConfig | None = None) -> None:
        self.verify_failures = 0  # tandem_kv_verify_failures_total
        self._channel = channel
        self._config = config or KvStoreConfig()
        self._stub: Any = kv_pb2_grpc.KvServiceStub(channel)
        self._posted: set[asyncio.Task[None]] = set()
        self._leaving: dict[tuple[KvHandle, str], asyncio.Task[None]] = {}  # leases that are being given back
        self._may_map = True  # until the store's answer shows that it is not so
        self._may_follow_in_place = False  # until it says so
        self._files_read, self._files_written = Mappings(), Mappings(writable=True)
        self._get: Any = channel.unary_stream(GET_KV, pb.GetKvRequest.SerializeToString)
        self._follow: Any = channel.unary_stream(FOLLOW_KV, pb.GetKvRequest.SerializeToString)

    @property
    def may_follow(self) -> bool:
        """Whether objects are worth following while they are written. What can be mapped, but only when it is
        complete, is there at once then."""
        return not self._may_map or self._may_follow_in_place

    def put(self, header: ObjectHeader) -> KvWriter:
        """`async with client.put(header) as writer`; leaving without `await writer.seal()` aborts."""
        return KvWriter(self._channel, header, self._config.put_deadline_s, self._files_written)

    async def get(
        self,
        handle: KvHandle,
        holder: str,
        *,
        tenant: str | None = None,
        lease_s: float | None = None,
        follow: bool = False,
        on_header: Callable[[ObjectHeader], None] | None = None,
        first_block: int = 0,
    ) -> AsyncGenerator[tuple[ChunkHeader, memoryview]]:
        """Verified chunks in the order they were written, under a lease that this renews as it reads. Their
        object's header goes to `on_header` before them. Chunks that end before `first_block` are left out.

        With `follow` the object may still be being written: chunks come as the store gets them. Use
        nothing of the object before the iteration has ended without an error. A payload is there until the
        next is asked for. The lease ends with the iteration; the object waits for another reader until it is
        released. Whoever stops early closes the iterator.
        """
        lease_s = lease_s or self._config.lease_s
        check = ReadCheck(handle, tenant, on_header, first_block)
        renew_at_s = time.monotonic() + lease_s / 3
        async with aclosing(self._messages(handle, holder, lease_s, follow, first_block)) as messages:
            async for message in messages:
                chunk = self._verified(partial(check.accept, message))
                if chunk is not None:
                    yield chunk
                if time.monotonic() >= renew_at_s:  # the answer comes behind what is on its way here
                    self._post(self.renew(handle, holder, lease_s))
                    renew_at_s = time.monotonic() + lease_s / 3
            self._verified(check.finish)

    async def release(self, handle: KvHandle, holder: str = "") -> bool:
        """Give up a holder's lease, or without a holder the object. False if that came late."""
        request = pb.ReleaseKvRequest(handle=handle.to_pb(), holder=holder)
        response: pb.ReleaseKvResponse = await self._ask(self._stub.ReleaseKv, request)
        return response.was_held

    async def renew(self, handle: KvHandle, holder: str, lease_s: float | None = None) -> None:
        """Let the lease run on from now; STALE_HANDLE if it is over."""
        lease_ms = _ms(lease_s or self._config.lease_s)
        request = pb.RenewLeaseRequest(handle=handle.to_pb(), holder=holder, lease_ms=lease_ms)
        await self._ask(self._stub.RenewLease, request)

    async def find(
        self, object_ids: Sequence[bytes], fingerprint: bytes, tenant: str
    ) -> tuple[list[KvHandle], bytes]:
        """Handles of cached prefixes up to the first that is missing, and the salt of their names, which is
        empty if the store keeps none."""
        request = pb.FindKvRequest(object_ids=object_ids, fingerprint=fingerprint, tenant=tenant)
        response: pb.FindKvResponse = await self._ask(self._stub.FindKv, request)
        return [KvHandle.from_pb(handle) for handle in response.handles], response.salt

    async def stat(self, handle: KvHandle) -> ObjectStat:
        """Where an object is in its life; NO_SUCH_HANDLE or STALE_HANDLE if it is over."""
        response = await self._ask(self._stub.StatKv, pb.StatKvRequest(handle=handle.to_pb()))
        name = pb.KvState.Name(response.state).removeprefix("KV_STATE_")
        return ObjectStat(ObjectState[name], response.num_bytes, response.num_leases)

    async def _messages(
        self, handle: KvHandle, holder: str, lease_s: float, follow: bool, first_block: int
    ) -> AsyncGenerator[Buffer]:
        """What the store holds of the object, where it lies if store and reader share a host."""
        if (leaving := self._leaving.get((handle, holder))) is not None:
            await asyncio.wait({leaving})  # else it would end the lease that comes
        await connected(self._channel)
        request = pb.GetKvRequest(
            handle=handle.to_pb(), holder=holder, lease_ms=_ms(lease_s), first_block=first_block
        )
        if self._files_read.are_here if follow else self._may_map:
            is_here = False
            async with aclosing(self._in_place(request) if follow else self._mapped(request)) as messages:
                async for message in messages:
                    is_here = True
                    yield message
            if is_here:
                return
        async with aclosing(self._sent(self._follow(request) if follow else self._get(request))) as messages:
            async for message in messages:
                yield message

    async def _sent(self, call: Any) -> AsyncGenerator[Buffer]:
        """What the store sends, as it comes."""
        reading = asyncio.create_task(self._read(call))
        try:
            while (message := await reading) is not None:
                reading = asyncio.create_task(self._read(call))  # comes while this one is used
                yield message
        finally:
            drop(reading)
            call.cancel()

    async def _mapped(self, request: pb.GetKvRequest) -> AsyncGenerator[Buffer]:
        """All of an object that lies on this host; nothing if it does not. A store of which nothing can be
        mapped here is not asked again."""
        asked = pb.MapKvRequest(handle=request.handle, holder=request.holder, lease_ms=request.lease_ms)
        may_hold = True  # a lease that only this reader can give back
        try:
            response: pb.MapKvResponse = await self._ask(self._stub.MapKv, asked)
            mapped = MappedObject.from_pb(response)
            messages = mapped.messages(self._files_read) if mapped else None
            may_hold = messages is not None
            self._may_map = messages is not None or response.may_map_others
            self._may_follow_in_place = response.may_follow
            for message in messages or ():
                if reaches(message, request.first_block):
                    yield message
        finally:
            if may_hold:
                self._leave(KvHandle.from_pb(request.handle), request.holder)

    async def _in_place(self, request: pb.GetKvRequest) -> AsyncGenerator[Buffer]:
        """An object as it is written, read where the store says it lies; nothing if that is not here."""
        call = self._follow(request, metadata=((MAY_MAP, "1"),))
        may_hold = True  # a lease that only this reader can give back
        try:
            async with aclosing(self._sent(call)) as messages:
                header = await anext(messages, b"")
                path = dict(await call.initial_metadata()).get(FILE)
                filling = path and self._verified(partial(self._filling, path, header, request.first_block))
                may_hold = bool(filling)
                if path and not filling:
                    return
                yield header
                async for message in messages:
                    if not filling:
                        yield message
                    else:
                        for found in self._verified(partial(filling.messages, message)):
                            yield found
        finally:
            if may_hold:
                self._leave(KvHandle.from_pb(request.handle), request.holder)

    def _filling(self, path: str, header: Buffer, first_block: int) -> FillingFile | None:
        """The file of an object that is being written, if it is here."""
        filling = FillingFile.mapped(self._files_read, path, header, first_block)
        self._files_read.are_here = filling is not None
        return filling

    def _leave(self, handle: KvHandle, holder: str) -> None:
        """Give a lease back; the holder's next one waits for that."""
        leaving = self._leaving[handle, holder] = self._post(self.release(handle, holder))

        def forget(_: Any) -> None:
            if self._leaving.get((handle, holder)) is leaving:
                del self._leaving[handle, holder]

        leaving.add_done_callback(forget)

    def _post(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[None]:
        """Do it while the caller goes on. What a lost store misses, the lease ends."""

        async def run() -> None:
            with suppress(TandemError, grpc.aio.UsageError):
                await work

        task = asyncio.create_task(run())
        self._posted.add(task)
        task.add_done_callback(self._posted.discard)
        return task

    async def _ask(self, method: Any, request: Any) -> Any:
        await connected(self._channel)
        with store_errors():
            return await method(request, timeout=UNARY_S)

    async def _read(self, call: Any) -> bytes | None:
        """The store gives a silent writer up first, and says so."""
        with store_errors():
            async with asyncio.timeout(2 * self._config.put_deadline_s):
                message = await call.read()
        return None if message is grpc.aio.EOF else message

    def _verified(self, check: Callable[[], T]) -> T:
        try:
            return check()
        except DataLoss:
            self.verify_failures += 1
            raise


def _ms(seconds: float) -> int:
    return max(1, round(1000 * seconds))
