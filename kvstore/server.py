"""tandem.kv.v1.KvService: a shell around `KvStore`. It decodes messages and holds streams to their deadlines.

A put whose stream ends without a seal, however it ends, is freed at once; a lease ends with its
stream. Errors leave as `TandemError`: `tandem.rpc.ErrorInterceptor` puts them on the wire. A chunk
that arrives corrupt is refused with KV_CORRUPT, which its writer may send again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc

from kvstore.books import MAX_LEASE_FACTOR
from kvstore.following import NOT_YET, Progress, follow
from kvstore.key import MODELS, KvHandle, ObjectKey, malformed, object_id_of, require
from kvstore.link import FILE, MAY_MAP, MAY_PLACE, RESERVED
from kvstore.mapping import MappedObject
from kvstore.objects import ObjectState, PutTicket
from kvstore.records import ChunkHeader, ObjectHeader, Placed, Record, Seal
from kvstore.store import KvStore
from kvstore.wire import decode, expect, reaches
from tandem.errors import DeadlineExceeded
from tandem.pb.kv.v1 import kv_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = "tandem.kv.v1.KvService"
MAX_LISTED = 1000
MAX_PIECES = 1 << 14  # of one prompt's prefix

_STATES = {
    ObjectState.RESERVED: pb.KV_STATE_RESERVED,
    ObjectState.SEALED: pb.KV_STATE_SEALED,
    ObjectState.LEASED: pb.KV_STATE_LEASED,
    ObjectState.RELEASED: pb.KV_STATE_RELEASED,
}


class KvServicer:
    """Serves one store. Needs a `Sweeper` beside it (kvstore/sweeper.py)."""

    def __init__(self, store: KvStore) -> None:
        self._store = store
        self._turns = store.turns
        self._progress = Progress()

    async def PutKv(self, request_iterator: AsyncIterator[bytes], context: Context) -> pb.PutKvResponse:
        header, _, _ = await self._next(request_iterator)
        may_place = MAY_PLACE in dict(context.invocation_metadata() or ())
        terms = expect(ObjectHeader, header), context.peer(), may_place
        ticket, path = await self._turns.take_or_undo(self._reserve, self._unreserve, *terms)
        key = ticket.object.key
        try:
            reserved = (RESERVED, str(self._store.store_epoch))
            await context.send_initial_metadata((reserved, (FILE, str(path))) if path else (reserved,))
            while True:
                record, payload, message = await self._next(request_iterator)
                if isinstance(record, Seal):
                    handle = await self._turns.take(self._store.seal, ticket, record)
                    return pb.PutKvResponse(handle=handle.to_pb())
                if isinstance(record, Placed):
                    await self._turns.take(self._store.append_placed, ticket, record)
                else:
                    chunk = expect(ChunkHeader, record)
                    await self._turns.take(self._store.append, ticket, chunk, payload, message)
                self._progress.note(key)
        finally:
            self._turns.post(self._store.abort, ticket)
            self._progress.note(key)

    async def GetKv(self, request: pb.GetKvRequest, context: Context) -> AsyncIterator[bytes]:
        handle = KvHandle.from_pb(request.handle)
        lease_s, undo = request.lease_ms / 1000, self._store.end
        lease = await self._turns.take_or_undo(self._store.lease, undo, handle, request.holder, lease_s)
        cut = self._cut_when_idle()

        def close(_: Any) -> None:
            cut.cancel()
            self._turns.post(self._store.end, lease)

        # A generator that is cut while its message is sent hears nothing; this does.
        cast(Any, context).add_done_callback(close)
        messages = self._store.read(lease)
        while (message := await self._turns.take(next, messages, None)) is not None:
            if not reaches(message, request.first_block):
                continue
            yield message
            cut.cancel()
            cut = self._cut_when_idle()

    async def FollowKv(self, request: pb.GetKvRequest, context: Context) -> AsyncIterator[bytes]:
        handle = KvHandle.from_pb(request.handle)
        may_map = MAY_MAP in dict(context.invocation_metadata() or ())
        terms = handle, request.holder, request.lease_ms / 1000
        following = await self._turns.take(partial(follow, self._store, *terms, may_map=may_map))
        cut = self._cut_when_idle()

        def close(_: Any) -> None:
            cut.cancel()
            self._turns.post(following.close)

        cast(Any, context).add_done_callback(close)
        if following.path is not None:
            await context.send_initial_metadata(((FILE, str(following.path)),))
        while (message := await self._turns.take(following.next)) is not None:
            if message is NOT_YET:
                await self._progress.wait(handle.key, self._store.config.sweep_s)
            elif reaches(message, request.first_block):
                yield message
                cut.cancel()
                cut = self._cut_when_idle()

    async def MapKv(self, request: pb.MapKvRequest, context: Context) -> pb.MapKvResponse:
        handle, lease_s = KvHandle.from_pb(request.handle), request.lease_ms / 1000

        def undo(mapped: MappedObject | None) -> None:
            if mapped is not None:
                self._store.release(handle, request.holder)

        terms = handle, request.holder, lease_s
        mapped = await self._turns.take_or_undo(self._store.lease_to_map, undo, *terms)
        response = mapped.to_pb() if mapped else pb.MapKvResponse(may_map_others=self._store.places.may_map)
        response.may_follow = self._store.places.may_follow
        return response

    async def FindKv(self, request: pb.FindKvRequest, context: Context) -> pb.FindKvResponse:
        require(len(request.object_ids) <= MAX_PIECES)
        ids, tenant = list(request.object_ids), request.tenant
        handles = await self._turns.take(self._store.find, ids, request.fingerprint, tenant)
        return pb.FindKvResponse(
            handles=[handle.to_pb() for handle in handles], salt=self._store.prefixes.salt(tenant)
        )

    async def StatKv(self, request: pb.StatKvRequest, context: Context) -> pb.StatKvResponse:
        stat = await self._turns.take(self._store.stat, KvHandle.from_pb(request.handle))
        return pb.StatKvResponse(
            state=_STATES[stat.state], num_bytes=stat.num_bytes, num_leases=stat.num_leases
        )

    async def ListKv(self, request: pb.ListKvRequest, context: Context) -> pb.ListKvResponse:
        objects = await self._turns.take(self._store.list_objects, request.limit or MAX_LISTED)
        handed, prefixes = self._store.audits()
        return pb.ListKvResponse(
            objects=[info.to_pb() for info in objects],
            counters=asdict(self._store.counters),
            total_bytes=handed.total,
            owned_bytes=handed.owned,
            prefix_total_bytes=prefixes.total,
            prefix_owned_bytes=prefixes.owned,
        )

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        handle = KvHandle.from_pb(request.handle)
        await self._turns.take(self._store.renew, handle, request.holder, request.lease_ms / 1000)
        return pb.RenewLeaseResponse()

    async def ReleaseKv(self, request: pb.ReleaseKvRequest, context: Context) -> pb.ReleaseKvResponse:
        handle = KvHandle.from_pb(request.handle)
        was_held = await self._turns.take(self._store.release, handle, request.holder)
        return pb.ReleaseKvResponse(was_held=was_held)

    async def ForgetKv(self, request: pb.ForgetKvRequest, context: Context) -> pb.ForgetKvResponse:
        num_objects = 0
        for model in MODELS:
            key = ObjectKey(object_id_of("", request.request_id, model), request.epoch)
            num_objects += await self._turns.take(self._store.forget, key, request.tenant)
        return pb.ForgetKvResponse(num_objects=num_objects)

    def _reserve(self, header: ObjectHeader, writer: str, may_place: bool) -> tuple[PutTicket, Path | None]:
        """Lets a put begin, and says to a writer that asks for it where the object's file is."""
        ticket = self._store.reserve(header, writer)
        return ticket, self._store.places.for_writer(ticket) if may_place else None

    def _unreserve(self, reserved: tuple[PutTicket, Path | None]) -> None:
        self._store.abort(reserved[0])

    async def _next(self, requests: AsyncIterator[bytes]) -> tuple[Record, memoryview, bytes]:
        try:
            async with asyncio.timeout(self._store.config.put_deadline_s):
                message = await anext(requests)
        except TimeoutError:
            raise DeadlineExceeded("transfer") from None
        except StopAsyncIteration:
            raise malformed() from None
        return (*decode(message), message)

    def _cut_when_idle(self) -> asyncio.TimerHandle:
        """A reader that stalls loses its lease first, and learns that when it goes on. If it neither
        goes on nor away, its call ends after the longest time a lease may have."""
        task = asyncio.current_task()
        assert task is not None
        idle_s = MAX_LEASE_FACTOR * self._store.config.lease_s
        return asyncio.get_running_loop().call_later(idle_s, task.cancel)


def add_to_server(servicer: KvServicer, server: grpc.aio.Server) -> None:
    """Register the service; the generated function would put protobuf's copies back on the streams."""
    unary = grpc.unary_unary_rpc_method_handler
    handlers: dict[str, Any] = {
        "PutKv": grpc.stream_unary_rpc_method_handler(
            servicer.PutKv, request_deserializer=bytes, response_serializer=pb.PutKvResponse.SerializeToString
        ),
        "GetKv": grpc.unary_stream_rpc_method_handler(
            servicer.GetKv, request_deserializer=pb.GetKvRequest.FromString
        ),
        "FollowKv": grpc.unary_stream_rpc_method_handler(
            servicer.FollowKv, request_deserializer=pb.GetKvRequest.FromString
        ),
        "MapKv": unary(servicer.MapKv, pb.MapKvRequest.FromString, pb.MapKvResponse.SerializeToString),
        "FindKv": unary(servicer.FindKv, pb.FindKvRequest.FromString, pb.FindKvResponse.SerializeToString),
        "StatKv": unary(servicer.StatKv, pb.StatKvRequest.FromString, pb.StatKvResponse.SerializeToString),
        "ListKv": unary(servicer.ListKv, pb.ListKvRequest.FromString, pb.ListKvResponse.SerializeToString),
        "RenewLease": unary(
            servicer.RenewLease, pb.RenewLeaseRequest.FromString, pb.RenewLeaseResponse.SerializeToString
        ),
        "ReleaseKv": unary(
            servicer.ReleaseKv, pb.ReleaseKvRequest.FromString, pb.ReleaseKvResponse.SerializeToString
        ),
        "ForgetKv": unary(
            servicer.ForgetKv, pb.ForgetKvRequest.FromString, pb.ForgetKvResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
