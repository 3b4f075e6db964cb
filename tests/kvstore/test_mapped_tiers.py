"""Shared memory over a slower tier: writers fill files and readers map them, whatever moves meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.backends.shm import open_backend as open_shm
from kvstore.key import KvHandle
from kvstore.mapped_tiers import PlaceableTiers
from kvstore.store import KvStore
from kvstore.urls import backend_from_url
from kvstore.wire import encode
from tandem.config import KvStoreConfig
from tandem.errors import FailedPrecondition, Overloaded, Unavailable
from tandem.pb.kv.v1 import kv_pb2 as pb
from tests.clock import ManualClock
from tests.kvstore.backends import medium
from tests.kvstore.samples import Sample, make_header, make_sample
from tests.kvstore.samples import put as put_elsewhere
from tests.kvstore.test_placing import place, placed, read
from tests.kvstore.test_service import MIB, PAYLOAD, big, put, serving, until
from tests.kvstore.test_tiers import Failing

SAMPLES = [make_sample(make_header(bytes([number]) * 16), seed=number) for number in range(6)]
ONE, TWO, THREE, FOUR = SAMPLES[:4]
HOT_BYTES = 2 * ONE.header.most_message_bytes
CONFIG = KvStoreConfig(put_deadline_s=10, lease_s=30)


def store_over(backend) -> KvStore:
    clock = ManualClock()
    store = KvStore(backend, MIB, CONFIG, clock)
    store.clock = clock
    return store


@pytest.fixture(params=["disk", pytest.param("redis", marks=pytest.mark.redis)])
def store(request, tmp_path):
    """Two objects fit into the hot tier."""
    with medium(request.param, tmp_path) as slow:
        store = store_over(backend_from_url(f"shm://?bytes={HOT_BYTES}+{slow.url}"))
        yield store
        store.check_integrity()
        for key in list(store._books.objects):
            store.forget(key, "tenant-a")
        store.sweep(store.clock() + 1000)
        backend = store._backend
        assert (backend._used_bytes, backend._room, backend._sizes, backend._below) == (0, {}, {}, {})
        assert slow.contents(backend._lower) == []
        store.close()


def above(store) -> list[bytes]:
    """Objects in the hot tier, the least recently used first."""
    return [key.object_id for key in store._backend._sizes]


def ids(*samples: Sample) -> list[bytes]:
    return [sample.header.object_id for sample in samples]


def frames(store, handle: KvHandle) -> list[bytes]:
    lease = store.lease(handle, "over gRPC")
    found = list(store.read(lease))
    store.end(lease)
    return found


def mapped(store, handle: KvHandle, holder: str = "reader"):
    """The object's place, or None; it stays leased if it has one."""
    found = store.lease_to_map(handle, holder)
    return Path(found.location.path) if found else None


def test_writers_fill_files_and_what_moves_down_leaves_its_file_to_the_next(store):
    handles, paths = zip(*(placed(store, sample) for sample in SAMPLES), strict=True)
    assert above(store) == ids(*SAMPLES[-2:])
    assert len(set(paths)) == 2
    for handle, sample in zip(handles, SAMPLES, strict=True):
        assert frames(store, handle) == sample.frames
    assert store.counters.quarantined == 0


def test_what_a_writer_fills_stays_in_its_place(store):
    writing = [place(store, sample) for sample in (ONE, TWO)]
    ticket = store.reserve(THREE.header)
    assert store.places.for_writer(ticket) is None, "nothing may move for it, so its bytes must be sent"
    for chunk, payload in THREE.chunks:
        store.append(ticket, chunk, payload, encode(chunk, payload))
    for (earlier, path, note), sample in zip(writing, (ONE, TWO), strict=True):
        assert path.exists()
        store.append_placed(earlier, note)
        assert frames(store, store.seal(earlier, sample.seal)) == sample.frames
    assert frames(store, store.seal(ticket, THREE.seal)) == THREE.frames
    assert above(store) == ids(ONE, TWO)


def test_what_a_reader_has_mapped_stays_and_moves_once_it_is_done(store):
    handles = [placed(store, sample)[0] for sample in (ONE, TWO)]
    paths = [mapped(store, handle) for handle in handles]
    waiting = store.reserve(THREE.header)
    assert store.places.for_writer(waiting) is None
    assert store.abort(waiting)
    assert store.release(handles[0], "reader")
    placed(store, FOUR)
    assert above(store) == ids(TWO, FOUR)
    assert frames(store, handles[0]) == ONE.frames
    assert paths[1].read_bytes().startswith(TWO.frames[1])
    assert store.release(handles[1], "reader")


def test_an_object_that_moves_while_it_is_sent_is_read_on_below(store):
    handle = put_elsewhere(store, ONE)
    reading = store.read(store.lease(handle, "over gRPC"))
    found = [next(reading), next(reading)]
    for sample in (TWO, THREE):
        placed(store, sample)
    assert above(store) == ids(TWO, THREE)
    assert [*found, *reading] == ONE.frames


def test_an_object_that_moves_while_it_is_sent_to_the_store_goes_on_below(store):
    ticket = store.reserve(ONE.header)
    store.append(ticket, *ONE.chunks[0], encode(*ONE.chunks[0]))
    for sample in (TWO, THREE):
        placed(store, sample)
    for chunk, payload in ONE.chunks[1:]:
        store.append(ticket, chunk, payload, encode(chunk, payload))
    assert above(store) == ids(TWO, THREE)
    assert frames(store, store.seal(ticket, ONE.seal)) == ONE.frames


def test_a_late_writer_reaches_nobody_elses_object(store):
    late, path, note = place(store)
    with path.open("r+b") as file:
        store.clock.advance(CONFIG.put_deadline_s)
        handles = [placed(store, sample)[0] for sample in SAMPLES]
        file.write(b"late" * 1000)
    assert not path.exists()
    assert store.counters.quarantined == 1
    with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
        store.append_placed(late, note)
    for handle, sample in zip(handles, SAMPLES, strict=True):
        assert frames(store, handle) == sample.frames


def test_a_file_that_a_lost_reader_may_have_open_goes_when_its_object_moves(store):
    handle, path = placed(store, ONE)
    for _ in range(2):  # the second lease of a holder ends the first, whose reader said nothing
        mapped(store, handle)
    assert store.release(handle, "reader")
    others = {placed(store, sample)[1] for sample in SAMPLES[1:]}
    assert path not in others
    assert not path.exists()
    assert frames(store, handle) == ONE.frames


def test_what_is_read_a_second_time_moves_up_and_is_mapped(store):
    handles = [placed(store, sample)[0] for sample in SAMPLES[:3]]
    assert above(store) == ids(TWO, THREE)
    assert mapped(store, handles[0]).read_bytes().startswith(b"".join(ONE.frames[1:-1]))
    assert above(store) == ids(THREE, ONE)
    assert store.release(handles[0], "reader")


def test_what_is_too_large_for_the_hot_tier_begins_below(store):
    large = make_sample(make_header(b"large" + bytes(11), cell_bytes=64 << 10))
    ticket = store.reserve(large.header)
    assert store.places.for_writer(ticket) is None
    assert store.abort(ticket)
    handle = put_elsewhere(store, large)
    assert mapped(store, handle) is None
    assert frames(store, handle) == large.frames


def test_a_medium_that_is_full_sooner_than_the_tier_leaves_objects_below(store, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", fail)
        ticket = store.reserve(ONE.header)
        assert store.places.for_writer(ticket) is None
        assert store._backend._used_bytes == 0
        for chunk, payload in ONE.chunks:
            store.append(ticket, chunk, payload, encode(chunk, payload))
    assert frames(store, store.seal(ticket, ONE.seal)) == ONE.frames


@pytest.mark.parametrize(
    "error",
    [Overloaded("NO_MEMORY_FIT_NOW", "full"), Unavailable("STORE_DOWN", "gone")],
    ids=["full", "gone"],
)
def test_a_lower_tier_that_fails_refuses_the_reservation_and_loses_nothing(error):
    backend = PlaceableTiers(open_shm("shm://"), HOT_BYTES, Failing(0, error))
    store = store_over(backend)
    handles = [placed(store, sample)[0] for sample in (ONE, TWO)]
    with pytest.raises(type(error)):
        store.reserve(THREE.header)
    assert above(store) == ids(ONE, TWO)
    assert [frames(store, handle) for handle in handles] == [ONE.frames, TWO.frames]
    assert store.release(handles[0])
    placed(store, THREE)
    assert above(store) == ids(TWO, THREE)
    store.check_integrity()
    store.close()


CRASH = """
import sys
from tests.kvstore.test_mapped_tiers import SAMPLES, store_over
from tests.kvstore.test_placing import placed
from kvstore.urls import backend_from_url
store = store_over(backend_from_url(sys.argv[1]))
handles = [placed(store, sample)[0] for sample in SAMPLES]
name = handles[-1].to_pb().SerializeToString().hex()
print(store._backend._upper._folder, store._backend._lower._folder, name, flush=True)
sys.stdin.read()
"""


def test_a_killed_store_leaves_nothing_to_the_next(tmp_path):
    url = f"shm://?bytes={HOT_BYTES}+disk://{tmp_path}"
    command = [sys.executable, "-c", CRASH, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        *folders, name = process.stdout.readline().split()
        assert [len(os.listdir(folder)) > 1 for folder in folders] == [True, True]
        process.send_signal(signal.SIGKILL)
        process.wait()
    store = store_over(backend_from_url(url))
    assert not any(map(os.path.exists, folders))
    with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
        store.lease(KvHandle.from_pb(pb.KvHandle.FromString(bytes.fromhex(name))), "reader")
    placed(store, ONE)
    store.close()


async def test_a_service_with_tiers_is_written_and_read_in_place(tmp_path, monkeypatch):
    sent, append = [], KvStore.append
    monkeypatch.setattr(KvStore, "append", lambda *args: (sent.append(args[2].length), append(*args)))
    backend = backend_from_url(f"shm://?bytes={5 * MIB}+disk://{tmp_path}")
    async with serving(backend=backend) as service, service.client() as client:
        handles = [await put(client, big(2, number)) for number in range(5)]
        assert sent == []
        assert backend.num_demoted == 3
        for handle in handles:
            assert await read(client, handle) == [PAYLOAD] * 2
            await until(lambda handle=handle: service.store.stat(handle).num_leases == 0)
        for handle in handles:
            assert await client.release(handle)
    service.store.close()
