"""A store behind a slow link, and one that stands still for a while: late is late, and never wrong."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import asynccontextmanager

import pytest

from kvstore.client import KvClient
from tandem import rpc
from tandem.config import KvStoreConfig
from tandem.errors import DeadlineExceeded
from tests.kvstore.samples import make_header, make_sample
from tests.kvstore.test_service import PAYLOAD, big, put, read_all, serving, until
from tests.road import road_to

BYTES_PER_S = 200_000


async def read_from_afar(config, sample):
    """What a reader gets at `BYTES_PER_S`, and the seconds that took."""
    async with serving(config=config) as service:
        async with service.client() as client, client.put(sample.header) as writer:
            for chunk, payload in sample.chunks:
                await writer.write(chunk, payload)
            handle = await writer.seal()
        async with road_to(f"127.0.0.1:{service.port}", BYTES_PER_S) as (_, far), rpc.channel(far) as channel:
            began_s = time.monotonic()
            read = await read_all(KvClient(channel, config).get(handle, "far"))
            took_s = time.monotonic() - began_s
        await until(lambda: service.store.audit().is_empty)
    return read, took_s


@pytest.mark.slow
async def test_a_reader_on_a_slow_link_keeps_its_lease():
    """The transfer takes several lease times."""
    config = KvStoreConfig(lease_s=0.5, sweep_s=0.02)
    sample = make_sample(make_header(num_blocks=64, cell_bytes=8192), blocks=1)
    read, took_s = await read_from_afar(config, sample)
    assert took_s > 4 * config.lease_s
    assert read == sample.chunks


@pytest.mark.slow
async def test_renewals_whose_answers_are_late_do_not_end_a_transfer(monkeypatch):
    """On a slow link they come behind what the store has sent already; the lease needs only the question."""
    monkeypatch.setattr("kvstore.client.UNARY_S", 0.2)
    sample = make_sample(make_header(num_blocks=20, cell_bytes=16384), blocks=1)
    read, _ = await read_from_afar(KvStoreConfig(lease_s=0.6, sweep_s=0.02), sample)
    assert read == sample.chunks


@asynccontextmanager
async def another_process():
    """A store of its own that can be stopped, and a client who waits half a second for each message."""
    command = [sys.executable, "-m", "bench.kv.child", "memory://", str(1 << 28)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        port = int(await process.stdout.readline())
        async with rpc.channel(f"127.0.0.1:{port}") as channel:
            yield process, KvClient(channel, KvStoreConfig(put_deadline_s=0.5))
    finally:
        process.send_signal(signal.SIGCONT)
        await process.communicate(b"")


@pytest.mark.slow
async def test_a_store_that_stands_still_is_late_and_then_serves_what_it_has():
    async with another_process() as (process, client):
        handle = await put(client, big(8))
        process.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="DEADLINE_TRANSFER"):
            [chunk async for chunk in client.get(handle, "reader")]
        assert time.monotonic() - began_s < 8
        process.send_signal(signal.SIGCONT)
        assert [payload == PAYLOAD async for _, payload in client.get(handle, "reader")] == [True] * 8
        assert await client.release(handle)


async def test_a_short_stop_in_mid_transfer_costs_only_time():
    async with another_process() as (process, client):
        handle = await put(client, big(32))
        chunks = client.get(handle, "reader")
        await anext(chunks)
        process.send_signal(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.3, process.send_signal, signal.SIGCONT)
        assert [payload == PAYLOAD async for _, payload in chunks] == [True] * 31
        assert await client.release(handle)
