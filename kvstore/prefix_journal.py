"""Which prefixes a store holds, and what of that has changed since somebody last asked."""

from __future__ import annotations

from kvstore.records import ObjectHeader


class PrefixJournal:
    """The store's turns write and read it."""

    def __init__(self) -> None:
        self._live: dict[bytes, ObjectHeader] = {}  # by object id
        self._changed: dict[bytes, ObjectHeader] = {}

    def note_sealed(self, header: ObjectHeader) -> None:
        self._live[header.object_id] = self._changed[header.object_id] = header

    def note_freed(self, header: ObjectHeader) -> None:
        if self._live.pop(header.object_id, None) is not None:
            self._changed[header.object_id] = header

    def take(self, *, all_of_them: bool = False) -> tuple[list[ObjectHeader], list[ObjectHeader]]:
        """What there is and was not before (or simply is), and what there was and is not."""
        changed, self._changed = self._changed, {}
        there = self._live if all_of_them else changed
        return (
            [header for object_id, header in there.items() if object_id in self._live],
            [header for object_id, header in changed.items() if object_id not in self._live],
        )
