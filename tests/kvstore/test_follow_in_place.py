"""Readers on the store's host follow an object in its own file: only notes come over gRPC, and nothing is
used that another object may have overwritten."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest

from kvstore.mapping import Mappings
from kvstore.records import Placed
from kvstore.store import KvStore
from kvstore.urls import backend_from_url
from kvstore.wire import encode
from tandem.errors import DataLoss
from tests.kvstore.samples import make_header, make_ranges, make_sample
from tests.kvstore.test_mapping import sharing
from tests.kvstore.test_service import MIB, PAYLOAD, big, put, read_all, serving, until


@pytest.fixture
def sent(monkeypatch):
    """Chunks that the store read to send them."""
    indices = []
    message = KvStore.message

    def noting(self, obj, index):
        if index:
            indices.append(index)
        return message(self, obj, index)

    monkeypatch.setattr(KvStore, "message", noting)
    return indices


async def test_chunks_come_as_they_are_written_and_none_of_them_is_sent(sent):
    header = big(3)
    ranges = make_ranges(header, blocks=1)
    async with sharing() as (service, client), client.put(header) as writer:
        read = []

        async def follow():
            async for chunk, payload in client.get(writer.handle, "reader", follow=True):
                read.append((chunk, bytes(payload)))

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
        assert [payload for _, payload in read] == [PAYLOAD] * 3
        await until(lambda: service.store.stat(handle).num_leases == 0)
        assert await read_all(client.get(handle, "late", follow=True)) == read
        assert await read_all(client.get(handle, "later", follow=True, first_block=2)) == read[2:]
        await client.release(handle)
        assert (sent, service.store.counters.leased) == ([], 3)


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_who_stops_following_leaves_no_lease(is_sealed):
    header = big(2)
    async with sharing() as (service, client), client.put(header) as writer:
        await writer.write(make_ranges(header, blocks=1)[0], PAYLOAD)
        if is_sealed:
            await writer.write(make_ranges(header, blocks=1)[1], PAYLOAD)
            await writer.seal()
        async with aclosing(client.get(writer.handle, "reader", follow=True)) as chunks:
            await anext(chunks)
        if is_sealed:
            await until(lambda: service.store.stat(writer.handle).num_leases == 0)
            assert await client.release(writer.handle)
        else:
            writer.abort()
        await until(lambda: service.store.audit().is_empty)


async def test_memory_waits_for_a_reader_that_has_the_seal_but_not_looked_at_all_chunks():
    """The stream has ended at the store by then; only the reader knows when it is done."""
    async with sharing() as (service, client):
        handle = await put(client, big(3))
        seen = []
        async with aclosing(client.get(handle, "reader", follow=True)) as chunks:
            async for _, payload in chunks:
                if not seen:
                    await asyncio.sleep(0.1)  # the store has sent its last message
                    assert await client.release(handle)  # as when its request is cancelled meanwhile
                    other = big(3, number=1)
                    async with client.put(other) as writer:
                        for where in make_ranges(other, blocks=1):
                            await writer.write(where, bytes(MIB))
                        await client.release(await writer.seal())
                seen.append(bytes(payload))
        assert seen == [PAYLOAD] * 3
        await until(lambda: service.store.audit().is_empty)


async def test_what_is_damaged_in_the_file_is_noticed():
    async with sharing() as (service, client):
        handle = await put(client, big(2))
        obj = service.store.known(handle)
        with service.store.places.for_follower(obj).open("r+b") as file:
            file.seek(MIB // 2)
            file.write(b"\xff\x00")
        with pytest.raises(DataLoss):
            await read_all(client.get(handle, "reader", follow=True))
        assert client.verify_failures == 1
        await until(lambda: service.store.stat(handle).num_leases == 0)
        await client.release(handle)


async def test_notes_that_do_not_end_with_a_chunk_are_refused(monkeypatch):
    async with sharing() as (service, client):
        handle = await put(client, big(1))
        end_of = service.store.places.end_of
        monkeypatch.setattr(service.store.places, "end_of", lambda obj: end_of(obj) - 1)
        with pytest.raises(DataLoss):
            await read_all(client.get(handle, "reader", follow=True))
        await client.release(handle)


async def test_a_reader_on_another_host_gets_the_bytes(monkeypatch, sent):
    async with sharing() as (service, client):
        handle = await put(client, big(2))
        asked = []
        monkeypatch.setattr(Mappings, "view", lambda self, path, *_, **__: asked.append(path))
        for _ in range(2):
            read = await read_all(client.get(handle, "reader", follow=True))
            assert [payload for _, payload in read] == [PAYLOAD] * 2
            await until(lambda: service.store.stat(handle).num_leases == 0)
        assert len(asked) == 1, "it asks once"
        assert sent == [1, 2] * 2
        await client.release(handle)


@asynccontextmanager
async def asked_once(url):
    """A client that has read one object of such a store."""
    async with serving(backend=backend_from_url(url)) as service, service.client() as client:
        handle = await put(client, big(1))
        await read_all(client.get(handle, "reader"))
        yield service, client, handle
        await until(lambda: service.store.stat(handle).num_leases == 0)
        await client.release(handle)
    service.store.close()


@pytest.mark.parametrize(
    ("url", "may_follow"),
    [("memory://", True), ("shm://", True), ("disk://{}", False), ("shm://?bytes=4194304+disk://{}", False)],
)
async def test_what_is_worth_following(url, may_follow, tmp_path):
    """What can be mapped only when it is complete is not."""
    async with asked_once(url.format(tmp_path)) as (_, client, _):
        assert client.may_follow is may_follow


async def test_what_moves_between_tiers_is_sent(tmp_path, sent):
    async with asked_once(f"shm://?bytes={4 << 20}+disk://{tmp_path}") as (_, client, handle):
        sent.clear()
        assert [payload for _, payload in await read_all(client.get(handle, "f", follow=True))] == [PAYLOAD]
        assert sent == [1]


async def test_chunks_that_were_sent_to_the_store_are_followed_in_place_too(sent):
    """Their writer is on another host, their reader on the store's."""
    sample = make_sample(make_header(num_blocks=4), blocks=1)
    async with sharing() as (_, client):
        client._files_written.are_here = False
        async with client.put(sample.header) as writer:
            following = asyncio.create_task(read_all(client.get(writer.handle, "reader", follow=True)))
            for chunk, payload in sample.chunks:
                await writer.write(chunk, payload)
                await asyncio.sleep(0.01)
            handle = await writer.seal()
            assert await following == sample.chunks
        assert sent == []
        await client.release(handle)


def test_a_note_is_no_chunk_of_an_object():
    """A store that sends one to a reader that did not ask is wrong."""
    from kvstore.reader import ReadCheck

    check = ReadCheck(big(1).handle(1))
    check.accept(encode(big(1)))
    with pytest.raises(DataLoss):
        check.accept(encode(Placed(end=10)))


@pytest.mark.parametrize("follow", [False, True])
async def test_who_leaves_at_any_moment_leaves_no_lease(follow):
    """However far the store is with its answer, and whether or not that has reached the reader."""
    async with sharing() as (service, client):
        handle = await put(client, big(3))
        for number in range(40):
            reading = asyncio.create_task(read_all(client.get(handle, f"reader-{number}", follow=follow)))
            await asyncio.sleep(number * 0.0002)
            reading.cancel()
            await asyncio.wait({reading})
        await until(lambda: service.store.stat(handle).num_leases == 0)
        await client.release(handle)
        await until(lambda: service.store.audit().is_empty)


@pytest.mark.parametrize("follow", [False, True])
async def test_a_holders_next_reading_waits_until_its_last_lease_is_given_back(follow, monkeypatch):
    """What is given back late would else be the lease of the next, and its memory another object's."""
    async with sharing() as (service, client):
        handle = await put(client, big(3))
        release = client.release

        async def late(*args):
            await asyncio.sleep(0.1)
            return await release(*args)

        monkeypatch.setattr(client, "release", late)
        await read_all(client.get(handle, "reader", follow=follow))
        async with aclosing(client.get(handle, "reader", follow=follow)) as chunks:
            await anext(chunks)
            await asyncio.sleep(0.3)
            assert service.store.stat(handle).num_leases == 1
        assert await client.release(handle)
