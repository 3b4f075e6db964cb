"""Tiers whose upper one is files of this host: readers map what lies there, writers fill it.

A file that somebody may look at stays where it is: a writer was told of it and has not sealed, or a reader
holds a lease. Only the store knows that, and is asked before an object moves down. What is in use is not
moved to make room; a new object then begins below, and its writer sends it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvstore.backend import Backend, Location, Mappable, Placeable, Use
from kvstore.key import ObjectKey
from kvstore.tiers import TieredBackend
from tandem.errors import Overloaded


class MappableTiers(TieredBackend):
    """Over an upper tier whose objects can be mapped."""

    _upper: Mappable

    def __init__(self, upper: Mappable, upper_bytes: int, lower: Backend) -> None:
        super().__init__(upper, upper_bytes, lower)

    def locate(self, key: ObjectKey) -> Location | None:
        """Where the upper tier has the object, which moves there if it can."""
        if key in self._below:
            self._promote(key)
        if key in self._below:
            return None
        self._sizes.move_to_end(key)
        return self._upper.locate(key)


class PlaceableTiers(MappableTiers):
    """Over an upper tier in whose files writers put objects by themselves."""

    _upper: Placeable

    def __init__(self, upper: Placeable, upper_bytes: int, lower: Backend) -> None:
        super().__init__(upper, upper_bytes, lower)
        self._use_of: Callable[[ObjectKey], Use] = lambda _: Use.NONE

    def watch(self, use_of: Callable[[ObjectKey], Use]) -> None:
        self._use_of = use_of

    def place(self, key: ObjectKey, num_bytes: int) -> None:
        """Room above for all of the object, or it begins below."""
        if self._make_room(key, num_bytes):
            try:
                self._open_above(key, num_bytes)
            except Overloaded:  # the medium is fuller than the tier
                self._forget(key)
            else:
                self._sizes[key] = []
                return
        self._below[key] = []

    def path(self, key: ObjectKey) -> Path | None:
        return None if key in self._below else self._upper.path(key)

    def placed(self, key: ObjectKey, end: int) -> memoryview:
        return self._upper.placed(key, end)

    def accept(self, key: ObjectKey, num_bytes: int) -> None:
        self._upper.accept(key, num_bytes)
        self._note_above(key, num_bytes)

    def recycle(self, key: ObjectKey) -> None:
        if key in self._below:
            self.delete(key)
        else:
            self._upper.recycle(key)
            self._forget(key)

    def _may_move(self, key: ObjectKey) -> bool:
        return self._use_of(key) is not Use.NOW

    def _clear_above(self, key: ObjectKey) -> None:
        if self._use_of(key) is Use.NONE:
            self._upper.recycle(key)
        else:
            super()._clear_above(key)

    def _open_above(self, key: ObjectKey, num_bytes: int) -> None:
        self._upper.place(key, num_bytes)
