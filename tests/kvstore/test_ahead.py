"""A reader asks for the next chunk while it uses one; a writer learns what the store says of its bytes."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from kvstore.urls import backend_from_url
from tandem.errors import DataLoss, TandemError
from tests.kvstore.test_service import PAYLOAD, big, make_ranges, put, serving, until


async def test_the_next_chunk_comes_while_one_is_used(monkeypatch):
    async with serving() as service, service.client() as client:
        handle = await put(client, big(4))
        read, num_read = client._read, 0

        async def counting(call):
            nonlocal num_read
            message = await read(call)
            num_read += 1
            return message

        monkeypatch.setattr(client, "_read", counting)
        async with aclosing(client.get(handle, "reader")) as chunks:
            _, first = await anext(chunks)
            await until(lambda: num_read == 3)  # the header, the first chunk, the second
            await asyncio.sleep(0.05)
            assert num_read == 3
            assert first == PAYLOAD


async def test_what_goes_wrong_meanwhile_is_raised_when_its_turn_comes(monkeypatch):
    async with serving() as service, service.client() as client:
        handle = await put(client, big(4))
        get = service.store._backend.get

        def spoiled(key, index):
            if index == 1:
                raise DataLoss
            return get(key, index)

        monkeypatch.setattr(service.store._backend, "get", spoiled)
        async with aclosing(client.get(handle, "reader")) as chunks:
            await anext(chunks)
            with pytest.raises(TandemError, match="KV_CORRUPT"):
                await anext(chunks)


async def test_a_refused_chunk_reaches_its_writer(monkeypatch):
    header = big(1)
    async with serving() as service, service.client() as client:
        async with client.put(header) as writer:
            monkeypatch.setattr(writer._digest, "chunk", lambda *_: bytes(16))
            await writer.write(make_ranges(header, blocks=1)[0], PAYLOAD)
            with pytest.raises(TandemError, match="KV_CORRUPT"):
                await writer.seal()
        assert service.store.audit().is_empty


@pytest.mark.parametrize("url", ["memory://", "shm://"])
async def test_a_writer_knows_how_long_its_bytes_took(url):
    backend = backend_from_url(url)
    async with serving(backend=backend) as s, s.client() as client, client.put(big(8)) as writer:
        began_s, elsewhere_s = time.perf_counter(), 0.0
        for where in make_ranges(big(8), blocks=1):
            await writer.write(where, PAYLOAD)
            left_s = time.perf_counter()
            await asyncio.sleep(0.02)  # computing: no part of it
            elsewhere_s += time.perf_counter() - left_s
        await writer.seal()
        assert 0 < writer.busy_s <= time.perf_counter() - began_s - elsewhere_s
    s.store.close()
