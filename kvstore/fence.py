"""Keeps a writer out that a later attempt at the same object has overtaken."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.books import Books
from kvstore.history import History
from kvstore.key import ObjectKey
from kvstore.objects import KvObject, ObjectState
from kvstore.records import ObjectHeader


class Fence:
    """Knows the latest attempt at each object. `books` are told to end the writing of earlier ones."""

    def __init__(self, books: Books, clock: Callable[[], float]) -> None:
        self._books = books
        self._clock = clock
        self._history = History()

    def has_seen(self, object_id: bytes) -> bool:
        """Whether anybody has tried to write this object."""
        return self._history.latest(object_id) is not None

    def lets_in(self, header: ObjectHeader) -> bool:
        """Whether this attempt may write; if so, it is the latest from now on."""
        latest = self._history.latest(header.object_id)
        if latest and (header.epoch < latest.epoch or header.tenant != latest.tenant):
            return False
        self.overtake(header.object_id, header.tenant, header.epoch)
        return True

    def overtake(self, object_id: bytes, tenant: str, epoch: int) -> None:
        """No attempt below `epoch` may write any more."""
        latest = self._history.latest(object_id)
        if latest and epoch > latest.epoch:
            overtaken = self._books.objects.get(ObjectKey(object_id, latest.epoch))
            if overtaken and overtaken.state is ObjectState.RESERVED:
                self._books.free(overtaken, ObjectState.RELEASED)
        self._history.note(object_id, tenant, epoch, self._clock())

    def note_freed(self, obj: KvObject) -> None:
        """Remember an object that is no more from now on, not from when it was reserved."""
        header = obj.header
        self._history.note(header.object_id, header.tenant, header.epoch, self._clock())
