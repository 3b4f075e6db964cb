"""A real server and a real client in one process: every way a stream can end."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import pytest

from kvstore.backends.memory import MemoryBackend
from kvstore.client import KvClient
from kvstore.key import KvHandle, object_id_of
from kvstore.link import Ending
from kvstore.objects import ObjectState
from kvstore.records import ObjectHeader
from kvstore.server import KvServicer, add_to_server
from kvstore.store import KvStore
from kvstore.sweeper import Sweeper
from kvstore.urls import backend_from_url
from kvstore.wire import encode
from tandem import rpc
from tandem.config import KvStoreConfig
from tandem.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    TandemError,
    Unavailable,
)
from tandem.pb.kv.v1 import kv_pb2 as pb
from tandem.pb.kv.v1 import kv_pb2_grpc
from tests.kvstore.samples import make_header, make_ranges, make_sample

MIB = 1 << 20
QUICK = KvStoreConfig(put_deadline_s=0.3, lease_s=0.3, sweep_s=0.02)


@dataclass
class Service:
    """A running store and where it listens."""

    store: KvStore
    server: grpc.aio.Server
    port: int
    config: KvStoreConfig
    sweeper: Sweeper

    @asynccontextmanager
    async def client(self, config: KvStoreConfig | None = None):
        async with rpc.channel(f"127.0.0.1:{self.port}") as channel:
            yield KvClient(channel, config or self.config)


@asynccontextmanager
async def serving(total_bytes=64 * MIB, config=None, port=0, backend=None):
    config = config or KvStoreConfig()
    store = KvStore(backend or MemoryBackend(), total_bytes, config)
    server = rpc.server(public=False)
    add_to_server(KvServicer(store), server)
    port = rpc.bind(server, "127.0.0.1", port)
    await server.start()
    try:
        async with Sweeper(store) as sweeper:
            yield Service(store, server, port, config, sweeper)
    finally:
        await server.stop(None)
    await store.turns.take(store.check_integrity)  # behind what goes on in a thread of its own


async def until(condition, within_s=30.0):
    """Wait for what happens in another task of this process."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (nobody tells a test)
            await asyncio.sleep(0.005)


async def write_all(writer, header):
    for where in make_ranges(header, blocks=1):
        await writer.write(where, PAYLOAD)
    return await writer.seal()


async def read_all(chunks):
    return [(chunk, bytes(payload)) async for chunk, payload in chunks]


def big(num_chunks: int, number: int = 0, **changes) -> ObjectHeader:
    """An object of `num_chunks` MiB: one block of 1 MiB per chunk."""
    return make_header(bytes([number]) * 16, num_blocks=num_chunks, num_layers=1, cell_bytes=MIB, **changes)


PAYLOAD = random.Random(0).randbytes(MIB)


async def put(client: KvClient, header: ObjectHeader) -> KvHandle:
    async with client.put(header) as writer:
        return await write_all(writer, header)


async def test_round_trip_of_32_mib():
    header = big(32)
    async with serving() as service, service.client() as client:
        handle = await put(client, header)
        assert (await client.stat(handle)).state is ObjectState.SEALED
        chunks = [chunk async for chunk in client.get(handle, "decode-0", tenant="tenant-a")]
        assert [chunk.block_start for chunk, _ in chunks] == list(range(32))
        assert all(payload == PAYLOAD for _, payload in chunks)
        await until(lambda: service.store.stat(handle).num_leases == 0)
        stat = await client.stat(handle)
        assert (stat.state, stat.num_bytes, stat.num_leases) == (ObjectState.SEALED, 32 * MIB, 0)
        assert not await client.release(handle, "decode-0")
        assert await client.release(handle)
        assert not await client.release(handle)
        assert service.store.audit().is_empty
        assert client.verify_failures == 0


async def test_chunks_and_views_of_any_kind():
    header = make_header(num_blocks=5, num_layers=4)
    sample = make_sample(header, blocks=2, layers=3)
    async with serving() as service, service.client() as client:
        async with client.put(header) as writer:
            for chunk, payload in sample.chunks:
                await writer.write(chunk, memoryview(bytearray(payload)))
            handle = await writer.seal()
        read = [(chunk, bytes(payload)) async for chunk, payload in client.get(handle, "reader")]
        assert read == sample.chunks
        await client.release(handle)
        await until(lambda: service.store.audit().is_empty)


async def test_leaving_without_a_seal_frees():
    header = big(8)
    async with serving() as service, service.client() as client:
        async with client.put(header) as writer:
            await writer.write(make_ranges(header, blocks=1)[0], PAYLOAD)
            assert service.store.bytes_in(ObjectState.RESERVED) == 8 * MIB
        await until(lambda: service.store.audit().is_empty)


async def test_cancelling_a_put_frees():
    header = big(8)
    async with serving() as service, service.client() as client:
        is_writing = asyncio.Event()

        async def write_for_ever():
            async with client.put(header) as writer:
                await writer.write(make_ranges(header, blocks=1)[0], PAYLOAD)
                is_writing.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(write_for_ever())
        await is_writing.wait()
        task.cancel()
        await asyncio.wait({task})
        await until(lambda: service.store.audit().is_empty)
        assert service.store.counters.freed == 1


async def test_forgetting_an_attempt_frees_what_it_stored_and_fences_what_it_will_store():
    attempt = pb.ForgetKvRequest(request_id="r", tenant="tenant-a", epoch=5)
    earlier, later, draft = (
        replace(big(2), object_id=object_id_of("", "r", model), epoch=epoch)
        for model, epoch in (("target", 5), ("target", 6), ("draft", 5))
    )
    async with serving() as service, service.client() as client:
        forget = kv_pb2_grpc.KvServiceStub(client._channel).ForgetKv
        await put(client, draft)
        async with client.put(earlier) as writer:
            assert (await forget(attempt)).num_objects == 2
            with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
                await write_all(writer, earlier)
        with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
            await put(client, earlier)
        assert service.store.audit().is_empty
        assert (await forget(attempt)).num_objects == 0

        await put(client, later)
        assert (await forget(attempt)).num_objects == 0
        assert service.store.bytes_in(ObjectState.SEALED) == later.total_bytes


async def test_a_writer_that_falls_silent_loses_its_bytes():
    async with serving(config=QUICK) as service, service.client(KvStoreConfig()) as client:
        header = big(2)
        async with client.put(header) as writer:
            await until(lambda: service.store.audit().is_empty)
            with pytest.raises((DeadlineExceeded, FailedPrecondition)):  # whichever notices first
                await write_all(writer, header)


async def test_cancelling_a_get_ends_its_lease():
    async with serving() as service, service.client() as client:
        handle = await put(client, big(32))
        async with aclosing(client.get(handle, "reader")) as chunks:
            await anext(chunks)
            assert service.store.stat(handle).num_leases == 1
        await until(lambda: service.store.stat(handle).num_leases == 0)
        assert service.store.stat(handle).state is ObjectState.SEALED

        async def read_slowly():
            async for _ in client.get(handle, "another"):
                await asyncio.Event().wait()

        task = asyncio.create_task(read_slowly())
        await until(lambda: service.store.stat(handle).num_leases == 1)
        task.cancel()
        await asyncio.wait({task})
        await until(lambda: service.store.stat(handle).num_leases == 0)


async def test_a_reader_that_takes_nothing_loses_its_lease():
    async with serving(config=QUICK) as service, service.client(replace(QUICK, put_deadline_s=5.0)) as client:
        handle = await put(client, big(32))
        chunks = client.get(handle, "reader")
        await anext(chunks)
        await until(lambda: service.store.audit().is_empty)
        with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
            await read_all(chunks)


async def test_a_long_read_renews_its_lease():
    config = replace(QUICK, put_deadline_s=5.0)
    async with serving(config=config) as service, service.client(config) as client:
        handle = await put(client, big(32))
        num_chunks = 0
        async for _ in client.get(handle, "reader"):
            num_chunks += 1
            await asyncio.sleep(0.02)
        assert num_chunks == 32
        assert service.store.counters.expired == 0


async def test_full_says_so_and_has_room_again():
    async with serving(4 * MIB) as service, service.client() as client:
        handle = await put(client, big(3))
        with pytest.raises(Overloaded) as refusal:
            await put(client, big(2, number=1))
        assert refusal.value.reason == "NO_MEMORY_FIT_NOW"
        assert refusal.value.retry_after_ms == 500
        assert refusal.value.metadata["free_bytes"] == str(MIB)
        with pytest.raises(InvalidRequest, match="NEVER_FITS"):
            await put(client, big(5, number=1))
        await client.release(handle)
        await put(client, big(2, number=1))
        assert service.store.bytes_in(ObjectState.SEALED) == 2 * MIB


async def test_a_restarted_store_knows_its_own_life_only():
    async with serving() as service, service.client() as client:
        handle = await put(client, big(1))
    async with serving(port=service.port) as service, service.client() as client:
        with pytest.raises(FailedPrecondition) as refusal:
            await anext(client.get(handle, "reader"))
        assert refusal.value.reason == "STALE_HANDLE"
        assert refusal.value.message == "handle is from an earlier store epoch"
        for operation in (client.stat(handle), client.renew(handle, "reader")):
            with pytest.raises(FailedPrecondition):
                await operation
        assert not await client.release(handle)
        with pytest.raises(NotFound):
            await client.stat(replace(handle, store_epoch=service.store.store_epoch))


async def test_a_store_that_dies_under_a_reader_is_down():
    async with serving() as service, service.client() as client:
        handle = await put(client, big(32))
        chunks = client.get(handle, "reader")
        await anext(chunks)
        await service.server.stop(None)
        async with asyncio.timeout(5):
            with pytest.raises(Unavailable) as refusal:
                await read_all(chunks)
            assert refusal.value.reason == "STORE_DOWN"
            assert refusal.value.message == "KV store is unavailable"
            with pytest.raises(Unavailable):
                await client.stat(handle)


async def test_a_store_that_dies_under_a_writer_is_down():
    header = big(32)
    async with serving() as service, service.client() as client, client.put(header) as writer:
        await service.server.stop(None)
        async with asyncio.timeout(5):
            with pytest.raises(Unavailable, match="STORE_DOWN"):
                await write_all(writer, header)


async def test_nobody_there_is_told_at_once():
    async with serving() as service:
        pass
    async with service.client() as client, asyncio.timeout(5):
        for _ in range(10):
            with pytest.raises(Unavailable, match="STORE_DOWN"):
                await put(client, big(1))


async def test_somebody_there_who_does_not_answer_is_down_after_a_second():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with rpc.channel(f"127.0.0.1:{silent.getsockname()[1]}") as channel, asyncio.timeout(5):
            with pytest.raises(Unavailable, match="STORE_DOWN"):
                await put(KvClient(channel), big(1))


async def call_put(service: Service, messages: list[bytes]) -> TandemError | None:
    """Write anything, as a broken writer would, and return the store's answer."""
    async with rpc.channel(f"127.0.0.1:{service.port}") as channel:
        stub = kv_pb2_grpc.KvServiceStub(channel)
        call = stub.PutKv()
        ending = Ending(call)
        try:
            for message in messages:
                await call.write(pb.PutKvRequest.FromString(message))
            await call.done_writing()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            pass
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return rpc.to_tandem_error(ending.error or error)
    return None


async def test_a_writer_learns_why_it_was_refused():
    """However the refusal and a write on its way cross."""
    header = big(4)
    async with serving() as service, service.client() as client:
        for attempt in range(20):
            later = replace(header, epoch=attempt)
            async with client.put(later) as writer, client.put(replace(header, epoch=attempt + 1)):
                with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
                    await write_all(writer, later)


async def test_bad_streams_are_refused_and_freed():
    sample = make_sample()
    header, first, second, seal = sample.frames
    chunk, payload = sample.chunks[0]
    flipped = encode(chunk, bytes([payload[0] ^ 1]) + payload[1:])
    streams = {
        "nothing": ([], "BAD_MESSAGE"),
        "no header": ([first, second, seal], "BAD_MESSAGE"),
        "header twice": ([header, header], "BAD_MESSAGE"),
        "no seal": ([header, first, second], "BAD_MESSAGE"),
        "early seal": ([header, first, seal], "BAD_MESSAGE"),
        "swapped": ([header, second, first, seal], "BAD_MESSAGE"),
        "garbage": ([header, b"\x0a\x07garbage"], "BAD_MESSAGE"),
        "corrupt": ([header, flipped, second, seal], "KV_CORRUPT"),
    }
    async with serving() as service:
        for frames, reason in streams.values():
            error = await call_put(service, frames)
            assert error is not None
            assert error.reason == reason
        await until(lambda: service.store.audit().is_empty)
        assert service.store.counters.refused_corrupt == 1
        assert await call_put(service, sample.frames) is None


@pytest.mark.parametrize("where", range(4))
async def test_what_the_store_spoils_the_reader_finds(where):
    """One bit in each frame of a stored object; nothing spoiled is ever yielded."""
    sample = make_sample()
    async with serving() as service, service.client() as client:
        async with client.put(sample.header) as writer:
            for chunk, payload in sample.chunks:
                await writer.write(chunk, payload)
            handle = await writer.seal()
        stored = service.store.read

        def spoiled(lease):
            for number, data in enumerate(stored(lease)):
                yield data if number != where else data[:-1] + bytes([data[-1] ^ 1])

        service.store.read = spoiled
        seen = []

        async def read():
            async for chunk, payload in client.get(handle, "reader"):
                seen.append((chunk, bytes(payload)))

        with pytest.raises(DataLoss):
            await read()
        assert seen == sample.chunks[: len(seen)]
        assert client.verify_failures == 1


async def test_another_tenants_object_is_not_read():
    async with serving() as service, service.client() as client:
        handle = await put(client, big(1))
        with pytest.raises(DataLoss):
            await anext(client.get(handle, "reader", tenant="tenant-b"))


async def test_malformed_handles_are_refused():
    async with serving() as service, rpc.channel(f"127.0.0.1:{service.port}") as channel:
        stub = kv_pb2_grpc.KvServiceStub(channel)
        for handle in (pb.KvHandle(), pb.KvHandle(object_id=bytes(16), fingerprint=bytes(31))):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.StatKv(pb.StatKvRequest(handle=handle))
            assert rpc.to_tandem_error(refusal.value).reason == "BAD_MESSAGE"


async def test_the_sweep_survives_its_failures(caplog):
    store = KvStore(MemoryBackend(), MIB, QUICK)
    sweep, num_calls = store.sweep, 0

    def fails_twice():
        nonlocal num_calls
        num_calls += 1
        if num_calls <= 2:
            raise RuntimeError("planted")
        return sweep()

    store.sweep = fails_twice
    with caplog.at_level(logging.CRITICAL):
        async with Sweeper(store) as sweeper:
            await until(lambda: num_calls > 4)
            assert sweeper.num_failures == 2
            assert sweeper.age_s < 1


async def test_following_an_object_as_it_is_written():
    header = big(3)
    ranges = make_ranges(header, blocks=1)
    async with serving() as service, service.client() as client, client.put(header) as writer:
        read = []

        async def follow():
            async for chunk in client.get(writer.handle, "reader", follow=True):
                read.append(chunk)  # noqa: PERF401 (one by one, as others look at it)

        following = asyncio.create_task(follow())
        for place, where in enumerate(ranges):
            await asyncio.sleep(0.02)
            assert len(read) == place
            await writer.write(where, PAYLOAD)
            await until(lambda: len(read) > place)  # noqa: B023 (called in this very turn)
        assert not following.done()
        assert service.store.counters.leased == 0
        handle = await writer.seal()
        await following
        assert handle == writer.handle
        assert service.store.counters.leased == 1
        await until(lambda: service.store.stat(handle).num_leases == 0)
        assert [chunk async for chunk in client.get(handle, "late", follow=True)] == read
        await client.release(handle)


@pytest.mark.parametrize("url", ["memory://", "shm://"])
@pytest.mark.parametrize("end", ["abort", "fall silent", "forget"])
async def test_who_follows_an_object_that_is_given_up_learns_it(end, url):
    header = replace(big(3), object_id=object_id_of("", "r"))
    backend = backend_from_url(url)
    async with (
        serving(config=QUICK, backend=backend) as service,
        service.client() as client,
        client.put(header) as writer,
    ):
        await writer.write(make_ranges(header, blocks=1)[0], PAYLOAD)
        following = asyncio.create_task(read_all(client.get(writer.handle, "reader", follow=True)))
        await asyncio.sleep(0.05)
        if end == "abort":
            writer.abort()
        elif end == "forget":
            attempt = pb.ForgetKvRequest(request_id="r", tenant=header.tenant, epoch=header.epoch)
            await kv_pb2_grpc.KvServiceStub(client._channel).ForgetKv(attempt)
        with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
            await asyncio.wait_for(following, 5.0)
        assert service.store.audit().is_empty
    service.store.close()


async def test_who_stops_following_leaves_no_lease():
    header = big(2)
    async with serving() as service, service.client() as client:
        for is_sealed in (False, True):
            async with client.put(header) as writer:
                await writer.write(make_ranges(header, blocks=1)[0], PAYLOAD)
                if is_sealed:
                    await writer.write(make_ranges(header, blocks=1)[1], PAYLOAD)
                    await writer.seal()
                async with aclosing(client.get(writer.handle, "reader", follow=True)) as chunks:
                    await anext(chunks)
                if is_sealed:
                    await until(lambda: service.store.stat(writer.handle).num_leases == 0)
                    assert await client.release(writer.handle)
            await until(lambda: service.store.audit().is_empty)
