"""Objects that a process on the store's host maps instead of sending or receiving them.

What lies in an object's file are the very messages that PutKv and GetKv carry, and they are checked in the
same way. A file that will hold other objects later stays mapped here: mapping it anew would cost more than
the copy. The store puts another object there only when everybody who was told of the last has said that
they are done (kvstore/books.py).
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from kvstore.backend import Location
from kvstore.key import Buffer
from kvstore.records import ObjectHeader, Placed
from kvstore.wire import decode, expect, reaches, split
from tandem.errors import DataLoss, InvalidRequest
from tandem.pb.kv.v1 import kv_pb2 as pb

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; one fault per page would cost more
MAX_KEPT = 64  # each holds a file descriptor


@dataclass(frozen=True, slots=True)
class MappedObject:
    """Where the chunks are, and the two frames around them."""

    location: Location
    header: bytes
    seal: bytes

    def to_pb(self) -> pb.MapKvResponse:
        location = self.location
        return pb.MapKvResponse(
            path=location.path,
            ends=location.ends,
            header=self.header,
            seal=self.seal,
            is_reused=location.is_reused,
        )

    @classmethod
    def from_pb(cls, message: pb.MapKvResponse) -> Self | None:
        """None if the store keeps nothing that can be mapped."""
        if not message.path:
            return None
        location = Location(message.path, tuple(message.ends), message.is_reused)
        return cls(location, message.header, message.seal)

    def messages(self, mappings: Mappings) -> Iterator[Buffer] | None:
        """Header, chunks, seal; the chunks are views of the mapping. None if the file is not on this host."""
        location = self.location
        size = location.ends[-1] if location.ends else 0
        mapped = mappings.view(location.path, size, keep=location.is_reused)
        return None if mapped is None else self._cut(mapped)

    def _cut(self, mapped: memoryview) -> Iterator[Buffer]:
        yield self.header
        start = 0
        for end in self.location.ends:
            yield mapped[start:end]
            start = end
        yield self.seal


class FillingFile:
    """The file of an object that is being written, and how much of it has been read."""

    def __init__(self, view: memoryview, first_block: int) -> None:
        self._view = view
        self._first_block = first_block
        self._start = 0

    @classmethod
    def mapped(cls, mappings: Mappings, path: str, header: Buffer, first_block: int) -> Self | None:
        """None if it is not on this host. KV_CORRUPT if that is no header."""
        try:
            size = expect(ObjectHeader, decode(header)[0]).most_message_bytes
        except InvalidRequest as error:
            raise DataLoss from error
        view = mappings.view(path, size)
        return None if view is None else cls(view, first_block)

    def messages(self, message: Buffer) -> list[Buffer]:
        """The chunks that a note tells of, but for those that end before `first_block`; what is no note as it
        came. KV_CORRUPT if they are not whole."""
        try:
            record, _ = decode(message)
            if not isinstance(record, Placed):
                return [message]
            found = split(self._view[self._start : record.end])
            self._start = record.end
            return [chunk for chunk in found if reaches(chunk, self._first_block)]
        except InvalidRequest as error:
            raise DataLoss from error


class Mappings:
    """Files that this process has mapped, the last used of them kept for the next object that lies there."""

    def __init__(self, *, writable: bool = False) -> None:
        self.are_here = True  # until one that the store named was not
        self._writable = writable
        self._views: OrderedDict[str, memoryview] = OrderedDict()  # least recently used first

    def view(self, path: str, num_bytes: int, *, keep: bool = True) -> memoryview | None:
        """The first `num_bytes` of the file; None unless it is here, ours, and that long."""
        found = self._views.pop(path, None)
        if found is None or len(found) < num_bytes:
            self._forget_gone()
            found = _map(path, num_bytes, self._writable)
        if found is None:
            return None
        if keep:
            self._views[path] = found
        if len(self._views) > MAX_KEPT:
            self._views.popitem(last=False)
        return found[:num_bytes]

    def _forget_gone(self) -> None:
        """Where a file is new, others may have gone: their memory is free when the last mapping goes."""
        for path in [path for path in self._views if not os.path.exists(path)]:
            del self._views[path]

    def clear(self) -> None:
        self._views.clear()


def _map(path: str, num_bytes: int, writable: bool) -> memoryview | None:
    """All of the file, if it is there, is ours and is long enough."""
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
        if not is_ours or not 0 < num_bytes <= found.st_size:
            return None
        rights = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapped = mmap.mmap(descriptor, found.st_size, flags=mmap.MAP_SHARED, prot=rights)
    except OSError:
        return None  # no memory for another mapping: the bytes can be sent
    finally:
        os.close(descriptor)
    try:
        mapped.madvise(MADV_POPULATE_WRITE if writable else MADV_POPULATE_READ, 0, num_bytes)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel knows no such advice
            return None  # a page that cannot be read would kill this process when it is touched
    return memoryview(mapped)
