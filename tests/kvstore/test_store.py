"""The store's rules one by one, on a clock that stands still. The random schedules are in test_machine."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError

from kvstore.backends.memory import MemoryBackend
from kvstore.key import KvHandle
from kvstore.objects import ObjectState
from kvstore.records import Seal
from kvstore.store import KvStore
from kvstore.urls import backend_from_url, known_schemes
from kvstore.wire import encode
from tandem.config import KvStoreConfig
from tandem.errors import (
    ConfigError,
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Overloaded,
    TandemError,
)
from tandem.pb.kv.v1 import kv_pb2 as pb
from tests.clock import ManualClock
from tests.kvstore.samples import make_header, make_sample, put

CONFIG = KvStoreConfig(put_deadline_s=10.0, lease_s=30.0, sweep_s=0.5)
SAMPLE = make_sample()
SIZE = SAMPLE.header.total_bytes


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def store(clock):
    store = KvStore(MemoryBackend(), 10 * SIZE, CONFIG, clock)
    yield store
    store.check_integrity()
    clock.advance(20 * CONFIG.lease_s)
    store.sweep()
    store.check_integrity()
    assert store.audit().is_empty
    assert not store._backend._messages


def numbered(number: int, **changes):
    return make_header(bytes([number]) * 16, **changes)


def test_write_read_release(store):
    handle = put(store, SAMPLE)
    assert (handle.num_bytes, handle.num_tokens) == (SIZE, SAMPLE.header.num_tokens)
    lease = store.lease(handle, "reader")
    assert list(store.read(lease)) == SAMPLE.frames
    assert store.release(handle)
    assert store.stat(handle).state is ObjectState.RELEASED
    assert store.release(handle, "reader")
    assert store.audit().is_empty
    assert store.counters.freed == 1


def test_put_deadline_counts_from_the_last_chunk(store, clock):
    ticket = store.reserve(SAMPLE.header)
    assert store.bytes_in(ObjectState.RESERVED) == SIZE
    clock.advance(9)
    store.append(ticket, *SAMPLE.chunks[0], encode(*SAMPLE.chunks[0]))
    clock.advance(9)
    assert store.sweep() == 0
    clock.advance(2)
    assert store.sweep() == 1
    with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
        store.append(ticket, *SAMPLE.chunks[1], encode(*SAMPLE.chunks[1]))
    assert store.audit().is_empty


def test_full_refuses_at_once_with_the_figures(store):
    for number in range(10):
        store.reserve(numbered(number))
    with pytest.raises(Overloaded) as refusal:
        store.reserve(numbered(11))
    assert refusal.value.reason == "NO_MEMORY_FIT_NOW"
    assert refusal.value.retry_after_ms == 500
    assert refusal.value.metadata == {
        "needed_bytes": str(SIZE),
        "free_bytes": "0",
        "total_bytes": str(10 * SIZE),
    }
    with pytest.raises(InvalidRequest, match="NEVER_FITS"):
        store.reserve(numbered(12, num_blocks=31))


def test_seal_needs_everything(store):
    ticket = store.reserve(SAMPLE.header)
    with pytest.raises(InvalidRequest):
        store.seal(ticket, SAMPLE.seal)
    store.append(ticket, *SAMPLE.chunks[0], encode(*SAMPLE.chunks[0]))
    with pytest.raises(InvalidRequest):
        store.seal(ticket, SAMPLE.seal)
    store.append(ticket, *SAMPLE.chunks[1], encode(*SAMPLE.chunks[1]))
    with pytest.raises(InvalidRequest):
        store.seal(ticket, replace(SAMPLE.seal, num_chunks=3))
    with pytest.raises(DataLoss):
        store.seal(ticket, Seal(num_chunks=2, total_digest=bytes(16)))
    assert store.bytes_in(ObjectState.RESERVED) == SIZE
    handle = store.seal(ticket, SAMPLE.seal)
    assert store.seal(ticket, SAMPLE.seal) == handle


def test_a_corrupt_chunk_is_refused_and_may_be_sent_again(store):
    ticket = store.reserve(SAMPLE.header)
    chunk, payload = SAMPLE.chunks[0]
    with pytest.raises(DataLoss):
        store.append(ticket, chunk, bytes(len(payload)), b"")
    store.append(ticket, chunk, payload, encode(chunk, payload))
    assert store.counters.refused_corrupt == 1


def test_same_put_again_is_idempotent(store):
    handle = put(store, SAMPLE)
    assert put(store, SAMPLE) == handle
    assert (store.counters.sealed, store.counters.repeated) == (1, 1)
    assert store.bytes_in(ObjectState.SEALED) == SIZE


def test_other_content_under_the_same_name_is_refused(store):
    handle = put(store, SAMPLE)
    with pytest.raises(FailedPrecondition):
        put(store, make_sample(seed=1))
    with pytest.raises(FailedPrecondition):
        put(store, make_sample(replace(SAMPLE.header, num_tokens=SAMPLE.header.num_tokens + 1)))
    with pytest.raises(FailedPrecondition):
        put(store, make_sample(replace(SAMPLE.header, tenant="tenant-b", epoch=2)))
    assert list(store.read(store.lease(handle, "reader"))) == SAMPLE.frames


def test_second_writer_of_the_same_attempt_is_refused(store):
    ticket = store.reserve(SAMPLE.header)
    with pytest.raises(FailedPrecondition):
        store.reserve(SAMPLE.header)
    assert store.abort(ticket)
    assert not store.abort(ticket)
    put(store, SAMPLE)


def test_an_aborted_writer_does_not_touch_its_successor(store):
    earlier = store.reserve(SAMPLE.header)
    store.abort(earlier)
    later = store.reserve(SAMPLE.header)
    with pytest.raises(FailedPrecondition):
        store.append(earlier, *SAMPLE.chunks[0], b"")
    assert not store.abort(earlier)
    store.append(later, *SAMPLE.chunks[0], encode(*SAMPLE.chunks[0]))


def test_later_attempt_fences_the_earlier(store):
    earlier = store.reserve(SAMPLE.header)
    later = make_sample(replace(SAMPLE.header, epoch=2))
    handle = put(store, later)
    with pytest.raises(FailedPrecondition):
        store.append(earlier, *SAMPLE.chunks[0], b"")
    with pytest.raises(FailedPrecondition):
        store.reserve(SAMPLE.header)
    store.release(handle)
    with pytest.raises(FailedPrecondition):
        store.reserve(SAMPLE.header)


def test_a_sealed_earlier_attempt_stays_until_its_lease_time(store, clock):
    first = put(store, SAMPLE)
    second = put(store, make_sample(replace(SAMPLE.header, epoch=2)))
    assert store.lease(first, "reader")
    assert store.lease(second, "reader")
    clock.advance(31)
    store.sweep()
    assert store.audit().is_empty


def test_who_may_not_read(store, clock):
    handle = put(store, SAMPLE)
    writing = make_sample(numbered(1))
    store.reserve(writing.header)
    other_life = KvStore(MemoryBackend(), SIZE, CONFIG, clock)
    cases = {
        "STALE_HANDLE": [replace(handle, store_epoch=handle.store_epoch ^ 1)],
        "FINGERPRINT_MISMATCH": [replace(handle, fingerprint=b"\x01" * 32)],
        "NO_SUCH_HANDLE": [
            replace(handle, object_id=b"\x09" * 16),
            replace(handle, num_bytes=1),
            replace(handle, num_tokens=1),
            writing.header.handle(store.store_epoch),
        ],
    }
    for reason, handles in cases.items():
        for wrong in handles:
            with pytest.raises((FailedPrecondition, NotFound), match=reason):
                store.lease(wrong, "reader")
            assert not store.release(wrong) or wrong.object_id == writing.header.object_id
    with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
        other_life.lease(handle, "reader")
    store.release(handle)
    with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
        store.stat(handle)
    for holder in ("", "h" * 257):
        with pytest.raises(InvalidRequest):
            store.lease(handle, holder)


def test_no_changed_byte_of_a_handle_reads(store):
    """Nor a missing end: it names something else, or nothing at all."""
    handle = put(store, SAMPLE)
    sound = handle.to_pb().SerializeToString()
    places = [(i, bit) for i in range(len(sound)) for bit in (1, 128)]
    changed = [sound[:i] + bytes([sound[i] ^ bit]) + sound[i + 1 :] for i, bit in places]
    for message in [*changed, *(sound[:end] for end in range(len(sound)))]:
        with pytest.raises((DecodeError, TandemError)):
            store.lease(KvHandle.from_pb(pb.KvHandle.FromString(message)), "reader")
    assert store.lease(handle, "reader").handle == handle
    assert store.stat(handle).num_leases == 1


def test_leases_end_alone(store, clock):
    handle = put(store, SAMPLE)
    store.lease(handle, "a", 5)
    store.lease(handle, "b", 50)
    lease = store.lease(handle, "c", 7)
    clock.advance(6)
    assert store.stat(handle).num_leases == 2
    store.renew(handle, "c", 100)
    with pytest.raises(FailedPrecondition):
        store.renew(handle, "a")
    clock.advance(60)
    assert store.stat(handle).num_leases == 1
    assert len(list(store.read(lease))) == 4
    clock.advance(60)
    with pytest.raises(FailedPrecondition):
        store.stat(handle)


def test_an_ended_lease_leaves_the_object_for_another_reader(store, clock):
    handle = put(store, SAMPLE)
    clock.advance(29)
    assert store.end(store.lease(handle, "a"))
    clock.advance(29)
    assert store.stat(handle).state is ObjectState.SEALED
    assert store.lease(handle, "b")


def test_reading_stops_with_the_lease(store, clock):
    handle = put(store, SAMPLE)
    frames = store.read(store.lease(handle, "a", 1))
    next(frames)
    clock.advance(2)
    with pytest.raises(FailedPrecondition):
        next(frames)


def test_same_holder_again_replaces_its_lease(store):
    handle = put(store, SAMPLE)
    earlier = store.lease(handle, "a")
    later = store.lease(handle, "a")
    assert not store.end(earlier)
    assert store.stat(handle).num_leases == 1
    with pytest.raises(FailedPrecondition):
        next(store.read(earlier))
    assert store.end(later)
    assert store.counters.late == 1


def test_given_up_objects_take_no_new_reader(store):
    handle = put(store, SAMPLE)
    lease = store.lease(handle, "a")
    assert store.release(handle)
    assert not store.release(handle)
    with pytest.raises(FailedPrecondition):
        store.lease(handle, "b")
    store.renew(handle, "a")
    assert len(list(store.read(lease))) == 4
    assert store.end(lease)
    assert store.audit().is_empty


def test_no_lease_is_for_ever(store, clock):
    handle = put(store, SAMPLE)
    store.lease(handle, "a", 1e9)
    clock.advance(10 * CONFIG.lease_s)
    assert store.sweep() == 1


def test_cost_does_not_grow_with_the_number_of_objects():
    """An operation among 20,000 objects may cost a few times one among 200, not a hundred times."""

    def seconds_per_round(num_objects: int) -> float:
        store = KvStore(MemoryBackend(), 1 << 40, CONFIG)
        header = make_header(num_blocks=1, num_layers=1)
        for number in range(num_objects):
            store.reserve(replace(header, object_id=number.to_bytes(16, "big")))
        sample = make_sample(replace(header, object_id=b"\xff" * 16))
        best = float("inf")
        for epoch in range(20):
            again = make_sample(replace(sample.header, epoch=epoch))
            started_s = time.thread_time()
            handle = put(store, again)
            store.lease(handle, "reader")
            store.renew(handle, "reader")
            store.release(handle, "reader")
            store.release(handle)
            best = min(best, time.thread_time() - started_s)
        return best

    assert seconds_per_round(20_000) < 10 * seconds_per_round(200)


def test_backends_by_url():
    assert isinstance(backend_from_url("memory://"), MemoryBackend)
    assert known_schemes() == ["disk", "memory", "redis", "shm"]
    for url in ("s3://bucket", "memory", "", "..://x"):
        with pytest.raises(ConfigError, match="known: disk://, memory://, redis://, shm://"):
            backend_from_url(url)


def test_illegal_transition_is_a_bug(store):
    ticket = store.reserve(SAMPLE.header)
    with pytest.raises(ValueError, match="RESERVED → LEASED"):
        ticket.object.to(ObjectState.LEASED)
