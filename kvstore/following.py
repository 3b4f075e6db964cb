"""Reads an object while it is being written, and learns when there is more of it.

A reader on the store's host is told where the object lies instead, and up to which byte it may be read: what
it reads before the object is sealed may be another's by then, but without the seal none of it is used. From
the seal on its lease keeps others off that memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.key import KvHandle, ObjectKey
from kvstore.objects import KvObject, Lease, ObjectState
from kvstore.records import Placed
from kvstore.wire import encode

if TYPE_CHECKING:
    from kvstore.store import KvStore

NOT_YET = b""


class Following:
    """One reader's way through an object, message by message. The lease begins when the object is sealed:
    until then the writer's put deadline keeps it. It ends with the reading."""

    path: Path | None = None  # where the reader finds the chunks, if they are not sent

    def __init__(self, store: KvStore, handle: KvHandle, holder: str, lease_s: float) -> None:
        self._store = store
        self._handle = handle
        self._terms = holder, lease_s
        self._num_read = 0
        self._lease: Lease | None = None
        self._rest: Iterator[bytes] = iter(())
        self._is_closed = False

    def next(self) -> bytes | None:
        """The next message, `NOT_YET`, or None after the last. Fails as soon as the object is given up."""
        if self._is_closed:
            return None
        if self._lease is None:
            obj = self._store.known(self._handle)
            if obj.state is ObjectState.RESERVED:
                return self._peek(obj)
            self._lease = self._store.lease(self._handle, *self._terms)
            self._rest = self._read(self._lease)
        return next(self._rest, None)

    def close(self) -> None:
        """The reader is gone: its lease ends."""
        self._is_closed = True
        if self._lease is not None:
            self._store.end(self._lease)

    def _peek(self, obj: KvObject) -> bytes:
        """Of an object that is being written."""
        if self._num_read > len(obj.digests):
            return NOT_YET
        self._num_read += 1
        return self._store.message(obj, self._num_read - 1)

    def _read(self, lease: Lease) -> Iterator[bytes]:
        """The rest of an object that is complete."""
        return self._store.read(lease, self._num_read)


class FollowingInPlace(Following):
    """The same for a reader that has mapped the object's file: notes of how far that is filled stand for the
    chunks. Whoever has read to the end gives the lease back by itself, when it has looked at all of them."""

    def __init__(self, store: KvStore, handle: KvHandle, holder: str, lease_s: float, path: Path) -> None:
        super().__init__(store, handle, holder, lease_s)
        self.path = path
        self._has_ended = False

    def next(self) -> bytes | None:
        message = super().next()
        self._has_ended |= message is None and self._lease is not None  # and the seal has gone out
        return message

    def close(self) -> None:
        if self._has_ended:
            self._is_closed = True
        else:
            super().close()

    def _peek(self, obj: KvObject) -> bytes:
        if not self._num_read or self._num_read > len(obj.digests):
            return super()._peek(obj)
        return self._note(obj)

    def _read(self, lease: Lease) -> Iterator[bytes]:
        obj = self._store.leased(lease)
        if not self._num_read:
            yield super()._peek(obj)
        if self._num_read <= len(obj.digests):
            yield self._note(obj)
        assert obj.seal is not None, obj.state
        yield encode(obj.seal)

    def _note(self, obj: KvObject) -> bytes:
        self._num_read = len(obj.digests) + 1
        return encode(Placed(end=self._store.places.end_of(obj)))


def follow(store: KvStore, handle: KvHandle, holder: str, lease_s: float, *, may_map: bool) -> Following:
    """The way through an object for a reader that may share the store's host."""
    path = store.places.for_follower(store.known(handle)) if may_map else None
    if path is None:
        return Following(store, handle, holder, lease_s)
    return FollowingInPlace(store, handle, holder, lease_s, path)


class Progress:
    """Wakes those who wait for the next message of an object. Lives on the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[ObjectKey, asyncio.Event] = {}

    def note(self, key: ObjectKey) -> None:
        """Something happened to the object."""
        if event := self._waiting.pop(key, None):
            event.set()

    async def wait(self, key: ObjectKey, within_s: float) -> None:
        """Until something happens, or for so long."""
        event = self._waiting.setdefault(key, asyncio.Event())
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await event.wait()
        if self._waiting.get(key) is event:
            del self._waiting[key]
