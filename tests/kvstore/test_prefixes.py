"""Cached prefixes: found by content, kept within a budget of their own, evicted oldest use first."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.backends.memory import MemoryBackend
from kvstore.chain import piece_names
from kvstore.objects import ObjectState
from kvstore.store import KvStore
from tandem.config import KvStoreConfig
from tandem.errors import FailedPrecondition, InvalidRequest, Overloaded
from tests.clock import ManualClock
from tests.kvstore.samples import make_header, make_sample, put
from tests.kvstore.test_service import serving

CONFIG = KvStoreConfig(put_deadline_s=10.0, lease_s=30.0, prefix_s=100.0)
SIZE = make_header().total_bytes
FINGERPRINT, SALT = bytes(32), b"salt" * 8


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def store(clock):
    store = KvStore(MemoryBackend(), 2 * SIZE, CONFIG, clock, prefix_bytes=3 * SIZE)
    yield store
    store.check_integrity()
    for _ in range(2):  # leases first, then what was leased
        clock.advance(1000)
        store.sweep()
    assert all(audit.is_empty for audit in store.audits())
    assert not store._backend._messages


def prefix(number: int, **changes):
    values = {"epoch": 0, "is_prefix": 1, "tenant": ""} | changes
    return make_sample(make_header(bytes([number]) * 16, **values), number)


def names(*numbers: int) -> list[bytes]:
    return [bytes([number]) * 16 for number in numbers]


def found(store, *numbers: int) -> list[int]:
    return [handle.object_id[0] for handle in store.find(names(*numbers), FINGERPRINT, "")]


def test_the_longest_run_is_found(store):
    handles = [put(store, prefix(number)) for number in (1, 2, 4)]
    assert store.find(names(1, 2, 3, 4), FINGERPRINT, "") == handles[:2]
    assert found(store, 3, 1) == []
    assert (store.counters.prefix_hits, store.counters.prefix_misses) == (2, 4)


def test_only_the_same_build_and_tenant_find_it(store):
    put(store, prefix(1))
    put(store, make_sample(make_header(b"\x02" * 16, epoch=0, tenant="")))  # on its way to a decode worker
    assert store.find(names(1), b"\x01" * 32, "") == []
    assert store.find(names(1), FINGERPRINT, "other") == []
    assert found(store, 2) == []


def test_what_is_being_written_is_not_found(store):
    store.reserve(prefix(1).header)
    assert found(store, 1) == []
    with pytest.raises(FailedPrecondition):
        store.reserve(prefix(1).header)


def test_the_least_recently_used_makes_room(store):
    handles = {number: put(store, prefix(number)) for number in (1, 2, 3)}
    store.end(store.lease(handles[1], "reader"))  # 2 is the oldest use now
    put(store, prefix(4))
    assert [number for number in (1, 2, 3, 4) if found(store, number)] == [1, 3, 4]
    assert store.counters.evicted == 1
    put(store, prefix(5))
    assert [number for number in (1, 2, 3, 4, 5) if found(store, number)] == [1, 4, 5]
    assert store.counters.evicted == 2


def test_what_somebody_reads_or_writes_is_never_evicted(store):
    lease = store.lease(put(store, prefix(1)), "reader")
    store.reserve(prefix(2).header)
    store.lease(put(store, prefix(3)), "reader")
    with pytest.raises(Overloaded, match="NO_MEMORY_FIT_NOW"):
        store.reserve(prefix(4).header)
    assert list(store.read(lease)) == prefix(1).frames


def test_prefixes_and_hand_offs_do_not_take_each_others_room(store):
    for number in (1, 2, 3):
        put(store, prefix(number))
    for number in (11, 12):
        put(store, make_sample(make_header(bytes([number]) * 16)))
    with pytest.raises(Overloaded):
        store.reserve(make_header(b"\x0d" * 16))
    assert found(store, 1, 2, 3) == [1, 2, 3]
    with pytest.raises(InvalidRequest, match="NEVER_FITS"):
        store.reserve(make_header(b"\x09" * 16, epoch=0, is_prefix=1, num_blocks=12))
    assert found(store, 1, 2, 3) == [1, 2, 3]  # nothing was evicted for what cannot fit


def test_a_prefix_outlives_its_readers_but_not_its_time(store, clock):
    handle = put(store, prefix(1))
    store.lease(handle, "lost reader", 5.0)
    clock.advance(20)
    assert store.stat(handle).state is ObjectState.SEALED
    clock.advance(90)
    assert found(store, 1) == [1]
    clock.advance(11)
    assert found(store, 1) == []


def test_a_store_without_room_for_prefixes_says_so():
    store = KvStore(MemoryBackend(), SIZE, CONFIG)
    assert store.prefixes.salt("") == b""
    with pytest.raises(InvalidRequest, match="NEVER_FITS"):
        store.reserve(prefix(1).header)


def test_salts_differ_by_tenant_and_life(store):
    other = KvStore(MemoryBackend(), SIZE, CONFIG, prefix_bytes=SIZE)
    salts = {each.prefixes.salt(tenant) for each in (store, other) for tenant in ("", "a")}
    assert len(salts) == 4
    assert store.prefixes.salt("a") == store.prefixes.salt("a")


async def test_finding_over_the_wire():
    sample = prefix(1)
    async with serving() as service, service.client() as client:
        service.store._books.prefix_ledger.total = 4 * SIZE
        handle = put(service.store, sample)
        handles, salt = await client.find(names(1, 2), FINGERPRINT, "")
        assert (handles, salt) == ([handle], service.store.prefixes.salt(""))
        assert [bytes(payload) async for _, payload in client.get(handle, "r")] == [
            p for _, p in sample.chunks
        ]
        with pytest.raises(InvalidRequest):
            await client.find(names(1) * (1 << 15), FINGERPRINT, "")


tokens = st.lists(st.integers(0, (1 << 32) - 1), max_size=30)


@given(tokens, tokens, st.integers(1, 5))
def test_names_agree_exactly_as_far_as_the_tokens_do(one, other, size):
    ours, theirs = (piece_names(ids, size, FINGERPRINT, SALT) for ids in (one, other))
    assert len(ours) == len(one) // size
    for place, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        end = (place + 1) * size
        assert (mine == yours) == (one[:end] == other[:end])


def test_names_depend_on_salt_build_and_place():
    ids = list(range(8))
    variants = [
        piece_names(ids, 4, FINGERPRINT, SALT),
        piece_names(ids, 4, FINGERPRINT, b"other salt"),
        piece_names(ids, 4, b"\x01" * 32, SALT),
        piece_names(ids[4:] + ids[:4], 4, FINGERPRINT, SALT),
    ]
    assert len({name for names in variants for name in names}) == 8
