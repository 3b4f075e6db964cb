"""The prefix index that stores share: rows D1 to D10. What it says is a hint, and nothing waits for it."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given

from kvstore.announcer import Announcer
from kvstore.backends.memory import MemoryBackend
from kvstore.breaker import MAX_FAILURES, PAUSE_S, Breaker
from kvstore.index import BUDGET_S, TTL_S, IndexDown, PrefixIndex
from kvstore.index_entry import MAC_BYTES, MAX_ENTRY_BYTES, VERSION, BadEntry, EntryForm, Place
from kvstore.store import KvStore
from tandem.config import ClusterConfig, KvStoreConfig
from tandem.config_index import IndexConfig
from tandem.errors import ConfigError
from tests import redis_server
from tests.clock import ManualClock
from tests.kvstore.samples import put
from tests.kvstore.test_prefixes import FINGERPRINT, SIZE, prefix
from tests.serving import until

FORM = EntryForm(b"k" * 32)
SLACK_S = 0.75  # of a busy machine


def place(number: int = 1) -> Place:
    return Place("127.0.0.1:50051", bytes([number]) * 16, 7, 128)


def name_of(number: int = 1, form: EntryForm = FORM, tenant: str = "") -> str:
    return form.name(FINGERPRINT, tenant, bytes([number]) * 16)


@given(
    st.text(max_size=60), st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.integers(0, 9999)
)
def test_what_is_written_is_read(address, object_id, store_epoch, num_tokens):
    ours, name = Place(address, object_id, store_epoch, num_tokens), FORM.name(FINGERPRINT, "", object_id)
    value = FORM.pack(name, ours)
    assert FORM.unpack(name, value) == (ours, value)
    assert len(value) < MAX_ENTRY_BYTES


@given(st.data())
def test_no_changed_entry_is_believed(data):
    value = FORM.pack(name_of(), place())
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    for wrong in (bytes(changed), value[: data.draw(st.integers(0, len(value) - 1))], value + b"\0"):
        with pytest.raises(BadEntry):
            FORM.unpack(name_of(), wrong)


def test_an_entry_is_good_under_its_own_name_and_key_only():
    value = FORM.pack(name_of(), place())
    for form, name in (
        (FORM, name_of(2)),
        (FORM, name_of(tenant="other")),
        (EntryForm(b"K" * 32), name_of()),
    ):
        with pytest.raises(BadEntry):
            form.unpack(name, value)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [VERSION],
        {},
        [VERSION, 1, bytes(16), 1, 1],
        [VERSION, "a", bytes(15), 1, 1],
        [2, "a", bytes(16), 1, 1],
    ],
)
def test_a_signed_value_of_another_shape_is_none(fields):
    body = msgpack.packb(fields)
    with pytest.raises(BadEntry):
        FORM.unpack(name_of(0), FORM._mac(name_of(0), body) + body)


def test_names_are_of_one_tenant_and_build(tmp_path):
    tenants = {name_of(tenant=tenant) for tenant in ("", "a", "b")}
    builds = {FORM.name(bytes([build]) * 32, "", bytes(16)) for build in range(3)}
    assert len(tenants | builds) == 6
    assert all(name.startswith("v1:") and len(name.split(":")) == 4 for name in tenants | builds)
    assert name_of() != name_of(form=EntryForm(b"K" * 32), tenant="a")


def test_the_breaker_lets_one_through_now_and_then():
    clock = ManualClock()
    breaker = Breaker(clock)
    for _ in range(MAX_FAILURES):
        assert breaker.lets_through()
        breaker.note(is_good=False)
    assert not breaker.lets_through()
    clock.advance(PAUSE_S)
    assert [breaker.lets_through() for _ in range(3)] == [True, False, False]
    breaker.note(is_good=False)
    assert not breaker.lets_through()
    clock.advance(PAUSE_S)
    assert breaker.lets_through()
    breaker.note(is_good=True)
    assert breaker.lets_through()
    assert not breaker.is_open


def test_settings_that_cannot_work_are_refused(tmp_path):
    file = tmp_path / "key"
    file.write_text("short")
    file.chmod(0o600)
    wrong = [
        {"url": "http://host"},
        {"url": "redis://host"},
    ]
    for values in wrong:
        with pytest.raises(ConfigError, match="kvstore index"):
            IndexConfig(**values)
    with pytest.raises(ConfigError, match="32 bytes"):
        EntryForm.of(IndexConfig(url="redis://host", key_file=file))
    with pytest.raises(ConfigError, match="prefix_bytes"):
        ClusterConfig.from_dict({"kvstore": {"index": {"url": "redis://host", "key_file": str(file)}}})
    assert "secret" not in repr(IndexConfig(url="redis://:secret@host", key_file=file))


# --- against a real server ---


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with redis_server.running(tmp_path_factory.mktemp("index")) as server:
        yield server


@pytest.fixture
def server(shared):
    if shared.process is None:
        shared.start()
    with shared.client() as client:
        client.flushall()
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 0)
    return shared


@pytest.fixture
def settings(tmp_path):
    def of(server, **changes):
        file = tmp_path / "key"
        file.write_text("0123456789abcdef" * 4)
        file.chmod(0o600)
        return IndexConfig(**{"url": server.url, "key_file": file} | changes)

    return of


@asynccontextmanager
async def opened(config):
    index = PrefixIndex(config)
    try:
        yield index
    finally:
        await index.close()


def entries(index, *numbers):
    names = {number: name_of(number, index.form) for number in numbers}
    return {name: index.form.pack(name, place(number)) for number, name in names.items()}


@pytest.mark.redis
async def test_writing_and_removing_twice_is_once(server, settings):
    async with opened(settings(server)) as index:
        ours = entries(index, 1, 2)
        for _ in range(2):
            await index.put(ours)
        assert len(server.key_names()) == 2
        with server.client() as client:
            assert all(0 < client.pttl(name) <= 1000 * TTL_S for name in server.key_names())
        names = [*ours, name_of(3, index.form)]
        assert {name: found for name, (found, _) in (await index.find(names)).items()} == {
            name: place(number) for number, name in enumerate(ours, 1)
        }
        newer = {name: value + b"x" for name, value in ours.items()}
        await index.remove(newer)  # of another store: not ours to remove
        assert len(server.key_names()) == 2
        for _ in range(2):
            await index.remove(ours)
        assert server.key_names() == []


@pytest.mark.redis
async def test_planted_values_are_misses_and_an_alarm(server, settings):
    async with opened(settings(server)) as index:
        [name] = entries(index, 1)
        forged = EntryForm(b"K" * 32).pack(name, place())
        with server.client() as client:
            for value in (b"x", b"x" * (1 << 20), bytes(MAC_BYTES) + b"\x95", forged):
                client.set(name, value)
                assert await index.find([name]) == {}
            client.delete(name)
            client.hset(name, "a", "b")
            assert await index.find([name]) == {}
        assert index.report.num_refused == 5
        assert index.report.num_failures == 0


@pytest.mark.redis
async def test_a_server_that_stands_still_costs_the_budget_and_then_nothing(server, settings):
    async with opened(settings(server)) as index:
        await index.put(entries(index, 1))
        server.hold_still()
        try:
            for _ in range(MAX_FAILURES):
                started_s = time.monotonic()
                with pytest.raises(IndexDown):
                    await index.find([*entries(index, 1)])
                assert time.monotonic() - started_s < BUDGET_S + SLACK_S
            started_s = time.monotonic()
            for _ in range(100):
                with pytest.raises(IndexDown):
                    await index.find([*entries(index, 1)])
            assert time.monotonic() - started_s < BUDGET_S
            assert not index.is_up
            assert index.report.num_failures == MAX_FAILURES
        finally:
            server.go_on()
        index._breaker._closed_from_s = 0.0  # the pause is over
        assert len(await index.find([*entries(index, 1)])) == 1
        assert index.is_up


@pytest.mark.redis
async def test_one_that_is_down_at_start(server, settings):
    config = settings(server)
    server.kill()
    async with opened(config) as index:
        await index.check()  # degraded
        assert index.report.num_failures == 1
        server.start()
        await index.put(entries(index, 1))
    server.kill()
    async with opened(settings(server, required=True)) as index:
        with pytest.raises(ConfigError, match="required"):
            await index.check()


@pytest.mark.redis
async def test_one_that_evicts_is_refused_and_one_that_is_full_is_a_miss(server, settings):
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        async with opened(settings(server)) as index:
            with pytest.raises(ConfigError, match="noeviction"):
                await index.check()
            with pytest.raises(IndexDown):  # nor is it used when it comes later
                await index.find([*entries(index, 1)])
        client.config_set("maxmemory-policy", "volatile-ttl")
        async with opened(settings(server)) as index:
            await index.check()
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            with pytest.raises(IndexDown):
                await index.put(entries(index, 1))
            assert await index.find([*entries(index, 1)]) == {}


@pytest.mark.redis
async def test_a_storm_of_cancelled_commands_mixes_up_no_reply(server, settings):
    rng = random.Random(0)
    async with opened(settings(server)) as index:
        ours = entries(index, *range(200))
        await index.put(ours)

        async def look(number: int) -> bool:
            name = [*ours][number]
            found = await index.find([name])
            assert found[name] == (place(number), ours[name])
            return True

        answered = 0
        for _ in range(60):
            tasks = [asyncio.create_task(look(rng.randrange(200))) for _ in range(8)]
            await asyncio.sleep(rng.random() * 0.002)
            for task in rng.sample(tasks, 6):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(result is True or isinstance(result, asyncio.CancelledError) for result in results)
            answered += results.count(True)
        assert answered >= 120
        assert index.report.num_refused == index.report.num_failures == 0


@pytest.mark.redis
async def test_a_store_tells_what_it_holds_and_again_after_a_flush(server, settings):
    clock, config = ManualClock(), KvStoreConfig(sweep_s=0.02, prefix_s=100.0)
    store = KvStore(MemoryBackend(), SIZE, config, clock, prefix_bytes=8 * SIZE)
    index = PrefixIndex(settings(server))

    def told() -> set[int]:
        return {int(name.split(b":")[3][:2], 16) for name in server.key_names() if b":store:" not in name}

    async with Announcer(store, index, "127.0.0.1:1"):
        for number in (1, 2, 3):
            put(store, prefix(number))
        await until(lambda: told() == {1, 2, 3})
        with server.client() as client:
            client.flushall()
        await until(lambda: told() == {1, 2, 3})
        store.release(store.find([bytes([2]) * 16], FINGERPRINT, "")[0])
        await until(lambda: told() == {1, 3})
        server.kill()
        put(store, prefix(4))
        clock.advance(1000)
        store.sweep()  # freeing asks nobody
        assert all(audit.is_empty for audit in store.audits())
        put(store, prefix(5))
        server.start()
        index._breaker._closed_from_s = 0.0
        await until(lambda: told() == {5})


def test_stores_of_one_key_name_pieces_alike():
    stores = [KvStore(MemoryBackend(), SIZE, prefix_bytes=SIZE) for _ in range(3)]
    for store in stores[:2]:
        store.prefixes.share(FORM.names_secret)
    salts = [store.prefixes.salt("a") for store in stores]
    assert salts[0] == salts[1] != salts[2]
    assert stores[0].prefixes.salt("b") != salts[0]
