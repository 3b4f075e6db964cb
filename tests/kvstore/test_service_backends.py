"""A real server and a real client over every backend, and over one that goes away."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvstore.objects import ObjectState
from kvstore.urls import backend_from_url
from tandem.errors import TandemError
from tests import redis_server
from tests.kvstore.backends import SCHEMES, medium
from tests.kvstore.samples import make_ranges
from tests.kvstore.test_service import MIB, PAYLOAD, QUICK, big, put, serving, until


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_objects_cross_every_backend_and_leave_nothing(scheme, tmp_path):
    header = big(8)
    with medium(scheme, tmp_path) as place:
        backend = place.open()
        async with serving(backend=backend) as service, service.client() as client:
            handle = await put(client, header)
            chunks = [chunk async for chunk in client.get(handle, "decode-0", tenant="tenant-a")]
            assert [chunk.block_start for chunk, _ in chunks] == list(range(8))
            assert all(payload == PAYLOAD for _, payload in chunks)
            async with client.put(big(8, 1)) as writer:
                await writer.write(chunks[0][0], PAYLOAD)
            await until(lambda: service.store.bytes_in(ObjectState.RESERVED) == 0)
            assert await client.release(handle)
            await until(lambda: service.store.audit().is_empty)
        assert place.contents(backend) == []
        service.store.close()


@pytest.mark.redis
@pytest.mark.slow
async def test_a_redis_that_goes_away_is_named_and_nobody_else_waits_for_it(tmp_path):
    with redis_server.running(tmp_path) as server:
        async with serving(backend=backend_from_url(server.url)) as service, service.client() as client:
            handle = await put(client, big(2))
            server.hold_still()
            reading = asyncio.create_task(_read(client, handle))
            slowest_s = await _slowest_turn_of_the_loop(reading)
            assert slowest_s < 0.5  # Redis is given a second
            assert reading.result() == "STORE_DOWN"
            server.kill()
            with pytest.raises(TandemError, match="STORE_DOWN"):
                await put(client, big(2, 1))
            assert await client.release(handle)
            await until(lambda: service.store.audit().is_empty)
            server.start()
            assert await _read(client, await put(client, big(2, 2))) == 2 * MIB
        service.store.close()


@pytest.mark.redis
async def test_a_writer_that_goes_away_leaves_no_key(tmp_path):
    with redis_server.running(tmp_path) as server:
        backend = backend_from_url(server.url)
        async with serving(config=QUICK, backend=backend) as service, service.client() as client:
            writer = await client.put(big(2)).__aenter__()
            await writer.write(make_ranges(big(2), blocks=1)[0], PAYLOAD)
            await until(lambda: server.key_names() != [])
            writer.abort()
            await until(lambda: server.key_names() == [])
            assert service.store.audit().is_empty
        service.store.close()


async def _read(client, handle) -> int | str:
    try:
        return sum([len(payload) async for _, payload in client.get(handle, "reader")])
    except TandemError as error:
        return error.reason


async def _slowest_turn_of_the_loop(task) -> float:
    slowest_s = 0.0
    while not task.done():
        started_s = time.monotonic()
        await asyncio.sleep(0.01)
        slowest_s = max(slowest_s, time.monotonic() - started_s)
    return slowest_s
