"""An object that a reader on the store's host maps instead of receiving.

What is mapped are the very messages that GetKv would send, and they are checked in the same way. The
store only adds to its files and unlinks them, so a mapping stays good whatever becomes of the object.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from kvstore.backend import Location
from kvstore.key import Buffer
from tandem.pb.kv.v1 import kv_pb2 as pb


@dataclass(frozen=True, slots=True)
class MappedObject:
    """Where the chunks are, and the two frames around them."""

    location: Location
    header: bytes
    seal: bytes

    def to_pb(self) -> pb.MapKvResponse:
        location = self.location
        return pb.MapKvResponse(path=location.path, ends=location.ends, header=self.header, seal=self.seal)

    @classmethod
    def from_pb(cls, message: pb.MapKvResponse) -> Self | None:
        """None if the store keeps nothing that can be mapped."""
        if not message.path:
            return None
        return cls(Location(message.path, tuple(message.ends)), message.header, message.seal)

    def messages(self) -> Iterator[Buffer] | None:
        """Header, chunks, seal; the chunks are views of the mapping. None if the file is not on this host."""
        mapped = _map(self.location)
        return None if mapped is None else self._cut(mapped)

    def _cut(self, mapped: memoryview) -> Iterator[Buffer]:
        yield self.header
        start = 0
        for end in self.location.ends:
            yield mapped[start:end]
            start = end
        yield self.seal


def _map(location: Location) -> memoryview | None:
    """The file, if it is there, is ours and is as long as it is said to be."""
    try:
        descriptor = os.open(location.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
        if not is_ours or not location.ends or found.st_size < location.ends[-1]:
            return None
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # one fault per page would cost more
        return memoryview(mmap.mmap(descriptor, location.ends[-1], flags=flags, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)
