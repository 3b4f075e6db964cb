"""Names in the order of keys that keep changing: a heap; what is outdated in it goes as it surfaces."""

from __future__ import annotations

import heapq
from collections.abc import Callable

SLACK = 64  # outdated entries that are never worth a sweep


class Ranking:
    """Each name has one key; lower keys come first, ties go to the smaller name. A change costs O(log n)."""

    def __init__(self) -> None:
        self._keys: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def put(self, name: str, key: float) -> None:
        """Add a name, or move it."""
        if self._keys.get(name) == key:
            return
        self._keys[name] = key
        if len(self._heap) >= 2 * len(self._keys) + SLACK:
            self._heap = [(key, name) for name, key in self._keys.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (key, name))

    def remove(self, name: str) -> None:
        """Unknown names are ignored."""
        self._keys.pop(name, None)

    def key(self, name: str) -> float:
        return self._keys[name]

    def first(self, accepts: Callable[[str], bool] = lambda name: True) -> str | None:
        """The first name that is accepted; it costs as much as it has rejected names before it."""
        passed = []
        while self._heap:
            key, name = self._heap[0]
            is_current = self._keys.get(name) == key
            if is_current and accepts(name):
                break
            item = heapq.heappop(self._heap)
            if is_current:
                passed.append(item)
        found = self._heap[0][1] if self._heap else None
        for item in passed:
            heapq.heappush(self._heap, item)
        return found
