"""Writers on the store's host put chunks where they will be read; files are used again, never too early."""

from __future__ import annotations

import errno
import os
from contextlib import aclosing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import mapping
from kvstore.digest import ObjectDigest
from kvstore.key import KvHandle
from kvstore.objects import ObjectState
from kvstore.reader import ReadCheck
from kvstore.records import MAX_CHUNK_OVERHEAD, Placed
from kvstore.segments import PAGE_BYTES, FreeSegments, make_segment, size_class
from kvstore.store import KvStore
from kvstore.urls import backend_from_url
from kvstore.wire import encode
from tandem.config import KvStoreConfig
from tandem.errors import DataLoss, InvalidRequest, Overloaded
from tests.clock import ManualClock
from tests.kvstore.samples import make_header, make_ranges, make_sample
from tests.kvstore.test_mapping import path_of, sharing
from tests.kvstore.test_service import MIB, PAYLOAD, QUICK, big, put, serving, until


@pytest.fixture
def sent(monkeypatch):
    """Payload bytes that came to the store over gRPC."""
    lengths = []
    append = KvStore.append

    def noting(self, ticket, chunk, payload, message):
        lengths.append(chunk.length)
        append(self, ticket, chunk, payload, message)

    monkeypatch.setattr(KvStore, "append", noting)
    return lengths


@pytest.fixture
def store():
    clock = ManualClock()
    store = KvStore(backend_from_url("shm://"), 64 * MIB, KvStoreConfig(), clock)
    store.clock = clock
    yield store
    store.check_integrity()
    store.close()


SAMPLE = make_sample()


def place(store, sample=SAMPLE, *, change=lambda data: data) -> tuple:
    """Everything but the seal, by a writer that maps the file."""
    ticket = store.reserve(sample.header)
    path = store.places.for_writer(ticket)
    data = change(b"".join(encode(*chunk) for chunk in sample.chunks))
    with path.open("r+b") as file:
        file.write(data)
    return ticket, path, Placed(end=len(data))


def placed(store, sample=SAMPLE) -> tuple[KvHandle, Path]:
    ticket, path, note = place(store, sample)
    store.append_placed(ticket, note)
    return store.seal(ticket, sample.seal), path


async def read(client, handle, holder="reader"):
    async with aclosing(client.get(handle, holder)) as chunks:
        return [bytes(payload) async for _, payload in chunks]


async def test_no_payload_crosses_grpc(sent):
    async with sharing() as (service, client):
        for number in range(3):
            handle = await put(client, big(5, number))
            assert await read(client, handle) == [PAYLOAD] * 5
            assert await client.release(handle)
        await until(lambda: service.store.audit().is_empty)
    assert sent == []


async def test_a_writer_elsewhere_sends_its_bytes_into_the_same_file(sent, monkeypatch):
    async with sharing() as (_, client):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(mapping, "_map", lambda *_: None)
            handle = await put(client, big(3))
        assert sent == [MIB] * 3
        assert await read(client, handle) == [PAYLOAD] * 3


async def test_the_next_object_lies_in_the_same_file():
    async with sharing() as (service, client):
        paths = set()
        for number in range(3):
            handle = await put(client, big(4, number))
            paths.add(path_of(service, handle))
            assert await read(client, handle) == [PAYLOAD] * 4
            assert await client.release(handle)
        assert len(paths) == 1
        assert service.store.counters.quarantined == 0


async def test_a_file_that_a_lost_reader_may_have_open_is_not_used_again():
    backend = backend_from_url("shm://")
    async with serving(config=QUICK, backend=backend) as service, service.client() as client:
        handle = await put(client, big(2))
        path = path_of(service, handle)
        chunks = client.get(handle, "stalled")
        _, view = await anext(chunks)
        await until(lambda: service.store.audit().is_empty)
        await put(client, big(2, 1))
        assert service.store.counters.quarantined == 1
        assert not path.exists()
        assert view == PAYLOAD
        await chunks.aclose()
    service.store.close()


async def test_a_file_that_a_writer_left_in_the_middle_is_not_used_again():
    async with sharing() as (service, client):
        async with client.put(big(4)) as writer:
            await writer.write(make_ranges(big(4), blocks=1)[0], PAYLOAD)
            (path,) = (file.path for file in service.store._backend._files.values())
        await until(lambda: service.store.audit().is_empty)
        assert not path.exists()
        assert service.store.counters.quarantined == 1


def test_a_lease_that_another_of_its_holder_ended_may_still_be_read(store):
    handle, path = placed(store)
    store.lease_to_map(handle, "reader")
    store.lease_to_map(handle, "reader")
    assert store.release(handle, "reader")
    assert store.release(handle)
    assert not path.exists()
    assert store.counters.quarantined == 1


def test_an_expired_lease_may_still_be_read(store):
    handle, path = placed(store)
    store.lease_to_map(handle, "reader")
    store.clock.advance(1000)
    store.sweep()
    assert not path.exists()
    assert store.counters.quarantined == 1


def flip(data: bytes) -> bytes:
    """One bit of the last chunk's payload."""
    return data[:-1] + bytes([data[-1] ^ 1])


def accepted(store, handle: KvHandle) -> list[bytes]:
    """The payloads that a reader takes; DataLoss for what it does not."""
    check = ReadCheck(handle)
    chunks = [check.accept(message) for message in store.read(store.lease(handle, "reader"))]
    check.finish()
    return [bytes(chunk[1]) for chunk in chunks if chunk]


def test_a_damaged_beginning_is_found_before_anybody_is_given_it():
    store = KvStore(backend_from_url("shm://"), MIB, KvStoreConfig(), ManualClock(), prefix_bytes=MIB)
    sample = make_sample(make_header(is_prefix=1))
    ticket, _, note = place(store, sample, change=flip)
    with pytest.raises(DataLoss):
        store.append_placed(ticket, note)
    with pytest.raises(InvalidRequest):
        store.seal(ticket, sample.seal)
    assert store.counters.refused_corrupt == 1
    assert store.abort(ticket)
    store.close()


def test_a_damaged_hand_off_is_found_by_its_reader(store):
    ticket, _, note = place(store, change=flip)
    store.append_placed(ticket, note)
    handle = store.seal(ticket, SAMPLE.seal)
    with pytest.raises(DataLoss):
        accepted(store, handle)
    assert store.release(handle)


def test_the_store_does_not_look_at_what_is_handed_off(store, monkeypatch):
    """A prompt of a large model is hundreds of megabytes, and the store has one thread for all requests."""
    hashed = []
    monkeypatch.setattr(ObjectDigest, "chunk", lambda *args: hashed.append(args) or b"")
    placed(store)
    assert hashed == []


async def test_what_changes_after_the_check_is_found_by_the_reader():
    async with sharing() as (service, client):
        handle = await put(client, big(2))
        with path_of(service, handle).open("r+b") as file:
            file.seek(MIB + 5000)
            file.write(b"\0" * 8)
        with pytest.raises(DataLoss):
            await read(client, handle)
        assert client.verify_failures == 1


@pytest.mark.parametrize("end", [1, 100, 10_000, 1 << 40])
def test_a_note_of_what_is_not_there_is_refused(store, end):
    ticket, *_ = place(store)
    with pytest.raises(InvalidRequest, match="BAD_MESSAGE"):
        store.append_placed(ticket, Placed(end=end))
    assert store.abort(ticket)


@given(data=st.binary(min_size=1, max_size=300), keep=st.integers(0, 200))
def test_any_bytes_that_a_writer_left_are_checked(data, keep):
    store = KvStore(backend_from_url("shm://"), MIB, KvStoreConfig(), ManualClock())
    ticket, _, note = place(store, change=lambda right: (right[:keep] + data + right[keep:])[: len(right)])
    try:
        store.append_placed(ticket, note)
        handle = store.seal(ticket, SAMPLE.seal)
    except (InvalidRequest, DataLoss):
        assert ticket.object.state is ObjectState.RESERVED
    else:
        with suppress(DataLoss):
            assert accepted(store, handle) == [payload for _, payload in SAMPLE.chunks]
    store.close()


def test_a_writer_that_was_not_told_of_the_file_cannot_note_it(store):
    ticket = store.reserve(SAMPLE.header)
    with pytest.raises(InvalidRequest, match="BAD_MESSAGE"):
        store.append_placed(ticket, Placed(end=100))
    handle, _ = placed(store, make_sample(make_header(b"\x02" * 16)))
    repeat = store.reserve(make_header(b"\x02" * 16))
    assert store.places.for_writer(repeat) is None
    with pytest.raises(InvalidRequest, match="BAD_MESSAGE"):
        store.append_placed(repeat, Placed(end=100))
    assert store.release(handle)


def test_memory_that_is_not_there_refuses_the_reservation(store, monkeypatch):
    """Idle files are given back first."""
    for number in range(3):
        handle, _ = placed(store, make_sample(make_header(bytes([number]) * 16)))
        store.release(handle)
    idle, allocate = list(store._backend._free), os.posix_fallocate

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    large = make_header(b"\x07" * 16, cell_bytes=64 << 10)
    with pytest.raises(Overloaded, match="NO_MEMORY_FIT_NOW"):
        store.reserve(large)
    assert store.audit().is_empty
    assert idle
    assert not any(path.exists() for path in idle)
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    store.abort(store.reserve(large))


@given(st.integers(1, 1 << 40))
def test_a_size_is_at_most_a_quarter_too_large(num_bytes):
    size = size_class(num_bytes)
    assert num_bytes <= size <= max(num_bytes * 5 // 4 + PAGE_BYTES, PAGE_BYTES)
    assert size % PAGE_BYTES == 0
    assert size_class(size) == size


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40 * PAGE_BYTES)), max_size=40))
def test_files_wait_within_their_budget_and_never_serve_what_is_larger(tmp_path_factory, steps):
    folder, budget = tmp_path_factory.mktemp("segments"), 64 * PAGE_BYTES
    free, given = FreeSegments(budget), set()
    for number, (is_taken, num_bytes) in enumerate(steps):
        if is_taken:
            path = free.take(num_bytes)
            if path is not None:
                assert num_bytes <= path.stat().st_size <= 2 * size_class(num_bytes)
                given.remove(path)
        else:
            path = folder / str(number)
            make_segment(path, num_bytes)
            given.add(path)
            free.give(path)
        assert free.num_bytes == sum(path.stat().st_size for path in free) <= budget
        assert set(free) <= given


def test_a_file_whose_size_was_changed_is_not_used_again(tmp_path):
    make_segment(tmp_path / "file", 5000)
    os.truncate(tmp_path / "file", 5000)
    free = FreeSegments()
    free.give(tmp_path / "file")
    assert list(free) == []
    assert not (tmp_path / "file").exists()


def test_a_chunks_message_is_no_longer_than_is_allowed_for():
    header = make_header(num_blocks=65_536, num_layers=1)
    sample = make_sample(make_header())
    for chunk, payload in sample.chunks:
        assert len(encode(chunk, payload)) - len(payload) <= MAX_CHUNK_OVERHEAD
    assert header.most_message_bytes == header.total_bytes + 65_536 * MAX_CHUNK_OVERHEAD


def mapped_and_gone(folder: Path) -> list[str]:
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in mapped if f"{folder}/" in line and line.endswith("(deleted)")]


async def test_a_writer_that_left_keeps_no_memory():
    """Whoever still knows it: an exception's traceback, for one."""
    async with sharing() as (service, client):
        writers = []
        for number in range(3):
            async with client.put(big(1, number)) as writer:
                writers.append(writer)
        await until(lambda: service.store.audit().is_empty)
        handle = await put(client, big(4, 9))  # in a new file: those that have gone are let go
        assert not mapped_and_gone(path_of(service, handle).parent)
        await client.release(handle)
