"""`tandem audit` sees every process of a service, and what its store holds."""

from __future__ import annotations

import asyncio
import json

import pytest

from deploy.commands import audit as command
from kvstore.objects import ObjectState
from tandem.client import TandemClient
from tandem.errors import ConfigError, InvalidRequest
from tests.e2e.harness import MIB, ask, complete, config, running, store_of, until
from tests.kvstore.samples import make_header, make_sample, put

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_every_pool_and_object_is_seen():
    settings = config(cache={"prefix_bytes": MIB}, kvstore={"prefix_tokens": 32})
    async with running(settings, num_prefill=2) as cluster:
        await complete(cluster, ask(tuple(range(3, 90)), max_tokens=3))
        await until(lambda: not any(server.worker.num_running for server in cluster.prefills))
        store = store_of(cluster)
        handle = put(store, make_sample(make_header(b"\x07" * 16)))
        lease = store.lease(handle, "a reader")
        found = await command.collect(cluster.router.internal_address, 100)
        store.end(lease)
        assert store.release(handle)
    assert found.is_sound
    names = [(process, audit.pool) for process, audit in found.pools]
    assert sorted(pool for process, pool in names if process == "worker") == [
        "decode-0",
        "prefill-0",
        "prefill-1",
    ]
    assert ("router", "kvstore") in names
    [ours] = [info for info in found.objects if not info.is_prefix]
    assert (ours.key.object_id, ours.state, ours.holders) == (b"\x07" * 16, ObjectState.LEASED, ("a reader",))
    assert sum(info.is_prefix for info in found.objects) == 2
    assert found.counters["sealed"] == 4


async def test_it_prints_tables_and_json(capsys):
    async with running() as cluster:
        found = await command.collect(cluster.router.internal_address, 100)
    command._show(found, command.Console())
    assert "all books are in order" in capsys.readouterr().out
    assert json.loads(json.dumps(command._document(found)))["is_sound"]


async def test_the_clients_port_is_told_from_the_internal_one():
    async with running() as cluster:
        with pytest.raises(ConfigError, match="is not the router's internal listener"):
            await asyncio.to_thread(command.run, cluster.address, 100, as_json=True)
        async with TandemClient(cluster.router.internal_address) as client:
            with pytest.raises(InvalidRequest, match="is it another of the server's ports"):
                await client.models()
