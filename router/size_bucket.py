"""Waiting requests of about the same size: in order of rank, in order of need, and for how long passed.

The parts `router.queue` is made of. They know the order of entries and nothing of what needs mean.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Queueable(Protocol):
    """What the queue reads of a request."""

    @property
    def request_id(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def deadline_s(self) -> float: ...


T = TypeVar("T", bound=Queueable)


@dataclass(frozen=True, slots=True, eq=False)
class Entry(Generic[T]):
    """A waiting request, what it needs, and its place."""

    request: T
    need: int  # decode KV blocks
    put_s: float
    rank: tuple[float, int]  # lower goes first; the number makes it unique


class LazyHeap(Generic[T]):
    """A heap whose entries die elsewhere: the dead are skipped at the top, and swept when they outnumber
    the living, so that every operation stays cheap on average and memory stays bounded."""

    def __init__(self, key: Callable[[Entry[T]], float], is_alive: Callable[[Entry[T]], bool]) -> None:
        self._key = key
        self._is_alive = is_alive
        self._heap: list[tuple[float, tuple[float, int], Entry[T]]] = []
        self._sweep_at = 64

    def push(self, entry: Entry[T]) -> None:
        if len(self._heap) >= self._sweep_at:
            self._heap = [item for item in self._heap if self._is_alive(item[2])]
            heapq.heapify(self._heap)
            self._sweep_at = max(64, 2 * len(self._heap))
        heapq.heappush(self._heap, (self._key(entry), entry.rank, entry))

    def first(self) -> Entry[T] | None:
        while self._heap and not self._is_alive(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None


class Bucket(Generic[T]):
    """Entries whose needs have the same number of binary digits, and how long they are being passed."""

    def __init__(self, is_alive: Callable[[Entry[T]], bool]) -> None:
        self.size = 0
        self._by_rank: LazyHeap[T] = LazyHeap(lambda e: e.rank[0], is_alive)
        self._by_need: LazyHeap[T] = LazyHeap(lambda e: e.need, is_alive)
        self._passed_s = float("-inf")  # since when entries are being passed
        self._passed_rank = (float("-inf"), 0)  # the last in rank that passed since

    def push(self, entry: Entry[T]) -> None:
        self.size += 1
        self._by_rank.push(entry)
        self._by_need.push(entry)

    def first(self) -> Entry[T] | None:
        return self._by_rank.first()

    def offers(self) -> list[Entry[T]]:
        """The first by rank and the smallest, once if they are the same."""
        first, smallest = self._by_rank.first(), self._by_need.first()
        if first is None or smallest is None:
            return []
        return [first] if first is smallest else [first, smallest]

    def note_passed(self, rank: tuple[float, int], now_s: float) -> None:
        """Something of this rank went. Starts or continues the clock if the first here was before it."""
        first = self.first()
        if first is None or first.rank > rank:
            return
        if self._is_passed(first):
            self._passed_rank = max(self._passed_rank, rank)
        else:
            self._passed_s, self._passed_rank = now_s, rank

    def passed_for_s(self, now_s: float) -> float:
        """How long the first entry has been passed by others; 0 if it was not."""
        first = self.first()
        return now_s - self._passed_s if first is not None and self._is_passed(first) else 0.0

    def _is_passed(self, entry: Entry[T]) -> bool:
        return entry.put_s <= self._passed_s and entry.rank < self._passed_rank
