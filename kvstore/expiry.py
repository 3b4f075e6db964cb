"""Deadlines in any order, moved at will, at a cost that grows with the logarithm of their number.

A heap with lazy deletion: moving a deadline back leaves its entry where it is, and the entry is filed
again when it comes up; only moving one forward adds an entry. Knows nothing of what expires.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class ExpiryHeap(Generic[K]):
    """At most one deadline per key."""

    def __init__(self) -> None:
        self._deadlines: dict[K, float] = {}
        self._filed: dict[K, tuple[float, int]] = {}  # the one entry that counts for a key
        self._heap: list[tuple[float, int, K]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._deadlines)

    def set(self, key: K, deadline_s: float) -> None:
        self._deadlines[key] = deadline_s
        filed = self._filed.get(key)
        if filed is None or deadline_s < filed[0]:
            self._file(key, deadline_s)

    def remove(self, key: K) -> None:
        """Forget the key if it is known."""
        if self._deadlines.pop(key, None) is not None:
            del self._filed[key]
            self._compact()

    def pop_due(self, now_s: float) -> Iterator[K]:
        """Take out and yield every key whose deadline is past."""
        while self._heap and self._heap[0][0] <= now_s:
            filed_s, serial, key = heapq.heappop(self._heap)
            if self._filed.get(key) != (filed_s, serial):
                continue
            if self._deadlines[key] <= now_s:
                del self._deadlines[key], self._filed[key]
                yield key
            else:
                self._file(key, self._deadlines[key])

    def _file(self, key: K, deadline_s: float) -> None:
        self._serial += 1
        self._filed[key] = (deadline_s, self._serial)
        heapq.heappush(self._heap, (deadline_s, self._serial, key))

    def _compact(self) -> None:
        if len(self._heap) > 64 + 2 * len(self._deadlines):
            self._heap = [(*entry, key) for key, entry in self._filed.items()]
            heapq.heapify(self._heap)
