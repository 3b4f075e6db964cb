"""Where on this host objects lie, for readers that map them and for writers that fill them by themselves.

A writer says up to which byte it has put chunks, and each is checked where it lies before it counts: what
was not checked is no part of the object. Whoever was told of a place is somebody to wait for before it is
used again (`KvObject.use`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvstore.backend import Backend, Mappable, Moving, Placeable
from kvstore.key import require
from kvstore.mapping import MappedObject
from kvstore.objects import KvObject, ObjectState, PutTicket
from kvstore.records import ChunkHeader, Placed
from kvstore.wire import decode, encode, expect, split


class Places:
    """What the backend says of its files, if it has any."""

    def __init__(self, backend: Backend) -> None:
        self._mappable = backend if isinstance(backend, Mappable) else None
        self._placeable = backend if isinstance(backend, Placeable) else None
        self._may_follow = self._placeable is not None and not isinstance(backend, Moving)

    @property
    def may_follow(self) -> bool:
        """Whether an object can be mapped while it is written: it must have all of its file, for itself, and
        stay there."""
        return self._may_follow

    @property
    def may_map(self) -> bool:
        """Whether any object can be mapped."""
        return self._mappable is not None

    def for_reader(self, obj: KvObject) -> MappedObject | None:
        """A sealed object's place; None if this one has none."""
        location = self._mappable.locate(obj.key) if self._mappable is not None else None
        if location is None:
            return None
        assert obj.seal is not None, obj.state
        obj.is_shared = True
        return MappedObject(location, encode(obj.header), encode(obj.seal))

    def for_follower(self, obj: KvObject) -> Path | None:
        """The file of an object that may still be written; None if it cannot be read there."""
        if not self._may_follow or self._placeable is None:
            return None
        path = self._placeable.path(obj.key)
        obj.is_shared |= path is not None
        return path

    def end_of(self, obj: KvObject) -> int:
        """Up to which byte its file holds chunks that were checked."""
        location = self._mappable.locate(obj.key) if self._mappable is not None else None
        assert location is not None, obj.key
        return location.ends[-1]

    def for_writer(self, ticket: PutTicket) -> Path | None:
        """The file that the writer may fill, if it can open it."""
        obj = ticket.object
        if obj.state is not ObjectState.RESERVED or self._placeable is None:
            return None
        path = self._placeable.path(obj.key)
        obj.is_shared |= path is not None
        return path

    def chunks(self, ticket: PutTicket, placed: Placed) -> Iterator[tuple[ChunkHeader, memoryview, int]]:
        """What the writer has put there since: header, payload, and the bytes of the message around both.
        BAD_MESSAGE if it is not whole chunks."""
        obj, backend = ticket.object, self._placeable
        require(obj.is_shared and not ticket.is_repeat and placed.end <= obj.header.most_message_bytes)
        assert backend is not None, "nobody was told of a file that is not there"
        for message in split(backend.placed(obj.key, placed.end)):
            record, payload = decode(message)
            yield expect(ChunkHeader, record), payload, len(message)
