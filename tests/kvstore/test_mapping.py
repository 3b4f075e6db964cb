"""Readers on the store's host map shared memory: no payload crosses gRPC, every check stays."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from kvstore import mapping
from kvstore.mapping import MappedObject, Mappings
from kvstore.urls import backend_from_url
from tandem.errors import DataLoss, FailedPrecondition, NotFound
from tests.kvstore.test_service import MIB, PAYLOAD, big, put, serving, until


@asynccontextmanager
async def sharing(config=None):
    backend = backend_from_url("shm://")
    async with serving(backend=backend, config=config) as service, service.client() as client:
        yield service, client
    service.store.close()


@pytest.fixture
def streamed(monkeypatch):
    """The objects whose bytes were asked for over gRPC."""
    from kvstore.server import KvServicer

    asked = []
    stream = KvServicer.GetKv

    async def noting(self, request, context):
        asked.append(request.handle.object_id)
        async for message in stream(self, request, context):
            yield message

    monkeypatch.setattr(KvServicer, "GetKv", noting)
    return asked


def path_of(service, handle) -> Path:
    return Path(service.store._backend.locate(handle.key).path)


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


async def test_payload_is_read_where_it_lies(streamed):
    async with sharing() as (service, client):
        handle = await put(client, big(4))
        async with aclosing(client.get(handle, "reader", tenant="tenant-a")) as chunks:
            views = [payload async for _, payload in chunks]
        assert all(view == PAYLOAD for view in views)
        assert streamed == []
        await until(lambda: service.store.stat(handle).num_leases == 0)
        assert await client.release(handle)


async def test_an_object_is_leased_while_it_is_mapped():
    async with sharing() as (service, client):
        handle = await put(client, big(2))
        async with aclosing(client.get(handle, "reader")) as chunks:
            await anext(chunks)
            assert service.store.stat(handle).num_leases == 1
            assert await client.release(handle)
            assert path_of(service, handle).exists()
        await until(lambda: service.store.audit().is_empty)


@pytest.mark.parametrize("place", [0, 1000, MIB + 300, 2 * MIB])
async def test_corrupt_shared_memory_is_found(place):
    async with sharing() as (service, client):
        handle = await put(client, big(2))
        flip_a_bit(path_of(service, handle), place)
        with pytest.raises(DataLoss):
            [chunk async for chunk in client.get(handle, "reader")]
        assert client.verify_failures == 1
        await until(lambda: service.store.stat(handle).num_leases == 0)


async def test_another_objects_file_is_found():
    async with sharing() as (service, client):
        one, other = await put(client, big(2, 1)), await put(client, big(2, 2))
        backend = service.store._backend
        os.replace(path_of(service, other), path_of(service, one))
        with pytest.raises(DataLoss):
            [chunk async for chunk in client.get(one, "reader")]
        backend.delete(other.key)


async def test_a_reader_elsewhere_gets_the_bytes(monkeypatch, streamed):
    async with sharing() as (service, client):
        handle = await put(client, big(2))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(mapping, "_map", lambda *_: None)
            for _ in range(2):
                assert [payload == PAYLOAD async for _, payload in client.get(handle, "reader")] == [True] * 2
        assert len(streamed) == 2
        await until(lambda: service.store.stat(handle).num_leases == 0)


def test_what_is_not_ours_or_not_a_file_is_not_mapped(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    link = tmp_path / "link"
    link.symlink_to(file)
    os.mkfifo(tmp_path / "pipe")

    def messages(path, *ends):
        location = mapping.Location(str(path), ends)
        return MappedObject(location, b"header", b"seal").messages(Mappings())

    assert messages(file, 4, 10) is not None
    for path, ends in (
        (file, (4, 11)),
        (file, ()),
        (link, (4,)),
        (tmp_path / "pipe", (4,)),
        (tmp_path, (4,)),
    ):
        assert messages(path, *ends) is None


async def test_a_handle_is_checked_as_for_bytes():
    async with sharing() as (_, client):
        handle = await put(client, big(1))
        assert await client.release(handle)
        with pytest.raises((FailedPrecondition, NotFound)):
            [chunk async for chunk in client.get(handle, "reader")]


@pytest.mark.parametrize(
    ("number", "is_mapped"), [(errno.EINVAL, True), (errno.EIO, False), (errno.EFAULT, False)]
)
def test_a_file_that_cannot_be_read_is_not_mapped(tmp_path, monkeypatch, number, is_mapped):
    """On an older kernel nobody can tell, and it is."""

    class Failing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mapping.mmap, "mmap", Failing)
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert (Mappings().view(str(file), 10) is not None) == is_mapped


def test_files_stay_mapped_until_they_are_gone_or_too_many(tmp_path):
    mappings = Mappings()
    paths = [tmp_path / str(number) for number in range(mapping.MAX_KEPT + 3)]
    for path in paths:
        path.write_bytes(path.name.encode() * 4)

    def kept() -> list[str]:
        return [os.path.basename(path) for path in mappings._views]

    for path in paths[:3]:
        mappings.view(str(path), 4)
    mappings.view(str(paths[0]), 4)
    assert kept() == ["1", "2", "0"]
    paths[2].unlink()
    mappings.view(str(paths[1]), 4)
    assert kept() == ["2", "0", "1"]  # nothing new
    mappings.view(str(paths[3]), 4, keep=False)
    assert kept() == ["0", "1"]
    for path in paths[3:]:
        assert mappings.view(str(path), 4)[:1] == path.name.encode()[:1]
    assert len(kept()) == mapping.MAX_KEPT
    assert "0" not in kept()


def test_a_file_that_has_grown_is_mapped_anew(tmp_path):
    mappings, file = Mappings(), tmp_path / "file"
    file.write_bytes(b"a" * 10)
    assert mappings.view(str(file), 10) == b"a" * 10
    with file.open("ab") as stream:
        stream.write(b"b" * 10)
    assert mappings.view(str(file), 20) == b"a" * 10 + b"b" * 10
