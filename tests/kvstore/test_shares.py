"""Nobody keeps more than a share from the others."""

from __future__ import annotations

import pytest

from kvstore.backends.memory import MemoryBackend
from kvstore.store import KvStore
from tandem.config import KvStoreConfig
from tandem.errors import ConfigError, InvalidRequest, Overloaded
from tests.clock import ManualClock
from tests.kvstore.samples import make_header, make_sample, put

SIZE = make_header().total_bytes
CONFIG = KvStoreConfig(put_deadline_s=10.0, lease_s=30.0, tenant_share=0.5, writer_share=0.25)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def store(clock):
    store = KvStore(MemoryBackend(), 8 * SIZE, CONFIG, clock, prefix_bytes=8 * SIZE)
    yield store
    store.check_integrity()
    clock.advance(2000)
    store.sweep()
    store.check_integrity()
    assert not store._books.shares._held
    assert not store._books.shares._reserved


def header(number: int, **changes):
    return make_header(bytes([number]) * 16, **changes)


def test_a_writer_that_never_writes_keeps_its_share_and_no_more(store, clock):
    for number in range(2):
        store.reserve(header(number), "leaky")
    with pytest.raises(Overloaded, match="NO_MEMORY_FIT_NOW: one writer may reserve"):
        store.reserve(header(2), "leaky")
    store.reserve(header(3), "another")
    clock.advance(11)
    store.reserve(header(4), "leaky")


def test_what_is_written_or_given_up_counts_no_more(store):
    for number in range(4):
        put(store, make_sample(header(number)))
    other = {"tenant": "tenant-b"}
    tickets = [store.reserve(header(number, **other), "w") for number in (5, 6)]
    store.abort(tickets[0])
    store.reserve(header(7, **other), "w")


def test_a_tenant_keeps_its_share_and_no_more(store):
    handles = [put(store, make_sample(header(number))) for number in range(4)]
    with pytest.raises(Overloaded, match="TENANT_QUOTA"):
        store.reserve(header(5))
    put(store, make_sample(header(6, tenant="tenant-b")))
    put(store, make_sample(header(7, epoch=0, is_prefix=1)))  # another budget
    store.release(handles[0])
    put(store, make_sample(header(5)))


def test_shares_are_parts():
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="tenant_share"):
            KvStoreConfig(tenant_share=share)


def test_without_shares_what_cannot_fit_never_fits():
    store = KvStore(MemoryBackend(), SIZE - 1)
    with pytest.raises(InvalidRequest, match="NEVER_FITS"):
        store.reserve(header(1))
