"""Two backends as one: a small fast one over a large slow one.

An object lies in one of them. It is written to the fast one; when that has no room, the objects that were
used least recently move down, whole. An object that is read a second time from below moves up again:
most are read once, and moving those would cost more than it saves. Nothing is ever dropped here, so it
does not matter who reads what: what may go is the store's business. More than two tiers are pairs of
pairs.
"""

from __future__ import annotations

from collections import OrderedDict

from kvstore.backend import Backend
from kvstore.key import ObjectKey
from tandem.errors import TandemError


class TieredBackend:
    """`upper` keeps up to `upper_bytes` of messages, `lower` the rest."""

    def __init__(self, upper: Backend, upper_bytes: int, lower: Backend) -> None:
        self.is_blocking = upper.is_blocking or lower.is_blocking
        self.num_demoted = self.num_promoted = 0
        self._upper = upper
        self._upper_bytes = upper_bytes
        self._lower = lower
        self._sizes: OrderedDict[ObjectKey, list[int]] = OrderedDict()  # above; least recently used first
        self._room: dict[ObjectKey, int] = {}  # bytes that each may take above
        self._below: dict[ObjectKey, list[int]] = {}
        self._read_below: set[ObjectKey] = set()
        self._used_bytes = 0  # above

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        if key not in self._below and not self._make_room(key, self._size(key) + len(message)):
            self._demote(key)
        if key in self._below:
            self._lower.put(key, index, message)
            self._below[key].append(len(message))
        else:
            self._upper.put(key, index, message)
            self._note_above(key, len(message))

    def get(self, key: ObjectKey, index: int) -> bytes:
        if key in self._below and index == 0:
            self._note_reading(key)
        if key in self._below:
            return self._lower.get(key, index)
        self._sizes.move_to_end(key)
        return self._upper.get(key, index)

    def delete(self, key: ObjectKey) -> None:
        self._upper.delete(key)
        self._lower.delete(key)
        self._forget(key)

    def close(self) -> None:
        self._upper.close()
        self._lower.close()

    def _forget(self, key: ObjectKey) -> None:
        self._sizes.pop(key, None)
        self._used_bytes -= self._room.pop(key, 0)
        self._below.pop(key, None)
        self._read_below.discard(key)

    def _note_above(self, key: ObjectKey, num_bytes: int) -> None:
        """The object's next message is that long."""
        self._sizes.setdefault(key, []).append(num_bytes)
        self._sizes.move_to_end(key)

    def _size(self, key: ObjectKey) -> int:
        return sum(self._sizes.get(key, ()))

    def _make_room(self, key: ObjectKey, num_bytes: int) -> bool:
        """Whether the object may be that large above; others move down for it, unless it never fits."""
        more = num_bytes - self._room.get(key, 0)
        while num_bytes <= self._upper_bytes < self._used_bytes + more:
            other = next((other for other in self._sizes if other != key and self._may_move(other)), None)
            if other is None:
                return False
            self._demote(other)
        if num_bytes > self._upper_bytes:
            return False
        if more > 0:
            self._room[key] = num_bytes
            self._used_bytes += more
        return True

    def _may_move(self, key: ObjectKey) -> bool:
        """Whether an object may move down now."""
        return True

    def _demote(self, key: ObjectKey) -> None:
        """Move down what there is of the object; it stays above if that fails."""
        sizes = self._sizes.get(key, [])
        _copy(key, len(sizes), self._upper, self._lower)
        self._clear_above(key)
        self._forget(key)
        self._below[key] = sizes
        self.num_demoted += 1

    def _clear_above(self, key: ObjectKey) -> None:
        """The object lies below by now."""
        self._upper.delete(key)

    def _note_reading(self, key: ObjectKey) -> None:
        if key in self._read_below:
            self._promote(key)
        else:
            self._read_below.add(key)

    def _promote(self, key: ObjectKey) -> None:
        """Move up, if the object fits and the tiers let it; it can be read below as well."""
        sizes = self._below[key]
        try:
            if not self._make_room(key, sum(sizes)):
                return
            self._open_above(key, sum(sizes))
            _copy(key, len(sizes), self._lower, self._upper)
        except TandemError:
            self._used_bytes -= self._room.pop(key, 0)
            return
        self._lower.delete(key)
        del self._below[key]
        self._read_below.discard(key)
        self._sizes[key] = sizes
        self.num_promoted += 1

    def _open_above(self, key: ObjectKey, num_bytes: int) -> None:
        """Messages of so many bytes will come."""


def _copy(key: ObjectKey, num_messages: int, source: Backend, target: Backend) -> None:
    """All or nothing."""
    try:
        for index in range(num_messages):
            target.put(key, index, source.get(key, index))
    except BaseException:
        target.delete(key)
        raise
