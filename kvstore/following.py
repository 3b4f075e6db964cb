"""Reads an object while it is being written, and learns when there is more of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from kvstore.key import KvHandle, ObjectKey

if TYPE_CHECKING:
    from kvstore.objects import Lease
    from kvstore.store import KvStore

NOT_YET = b""


class Following:
    """One reader's way through an object, message by message. The lease begins when the object is sealed:
    until then the writer's put deadline keeps it."""

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
            message = self._store.peek(self._handle, self._num_read)
            if message is not None:
                self._num_read += message is not NOT_YET
                return message
            self._lease = self._store.lease(self._handle, *self._terms)
            self._rest = self._store.read(self._lease, self._num_read)
        return next(self._rest, None)

    def close(self) -> None:
        """The reader is gone: its lease ends."""
        self._is_closed = True
        if self._lease is not None:
            self._store.end(self._lease)


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
