"""Waiting requests of about the same size: in order of turn, in order of need, and for how long passed.

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
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def deadline_s(self) -> float: ...


T = TypeVar("T", bound=Queueable)
Rank = tuple[float, int]
Turn = tuple[float, Rank]  # lower goes first: the tenant's start in virtual time, then the rank
MIN_SWEEP = 64  # entries of a heap that are never worth one


@dataclass(frozen=True, slots=True, eq=False)
class Entry(Generic[T]):
    """A waiting request, what it needs, and its place."""

    request: T
    need: int  # decode KV blocks
    put_s: float
    rank: Rank  # lower goes first among a tenant's own; the number makes it unique


class LazyHeap(Generic[T]):
    """A heap whose entries die elsewhere: the dead are skipped at the top, and swept when they outnumber
    the living, so that every operation stays cheap on average and memory stays bounded."""

    def __init__(self, key: Callable[[Entry[T]], float], is_alive: Callable[[Entry[T]], bool]) -> None:
        self._key = key
        self._is_alive = is_alive
        self._heap: list[tuple[float, Rank, Entry[T]]] = []
        self._sweep_at = MIN_SWEEP

    def push(self, entry: Entry[T]) -> None:
        if len(self._heap) >= self._sweep_at:
            self._heap = [item for item in self._heap if self._is_alive(item[2])]
            heapq.heapify(self._heap)
            self._sweep_at = max(MIN_SWEEP, 2 * len(self._heap))
        heapq.heappush(self._heap, (self._key(entry), entry.rank, entry))

    def first(self) -> Entry[T] | None:
        while self._heap and not self._is_alive(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None


class TurnHeap(Generic[T]):
    """The first entry of the tenant whose turn it is. One line per tenant by rank, and a heap of their heads:
    a head that is outdated, because it went or its tenant was served, is put right when it surfaces, which is
    in time as turns only get later."""

    def __init__(self, turn: Callable[[Entry[T]], Turn], is_alive: Callable[[Entry[T]], bool]) -> None:
        self._turn = turn
        self._is_alive = is_alive
        self._lines: dict[str, LazyHeap[T]] = {}
        self._heads: list[tuple[Turn, Entry[T]]] = []
        self._sweep_at = MIN_SWEEP

    def push(self, entry: Entry[T]) -> None:
        line = self._lines.setdefault(entry.request.tenant, LazyHeap(lambda e: e.rank[0], self._is_alive))
        line.push(entry)
        if line.first() is entry:
            if len(self._heads) >= self._sweep_at:
                self._sweep()
            heapq.heappush(self._heads, (self._turn(entry), entry))

    def first(self) -> Entry[T] | None:
        while self._heads:
            turn, entry = self._heads[0]
            head = self._head(entry.request.tenant)
            if head is entry and turn == self._turn(entry):
                return entry
            if head is None:
                heapq.heappop(self._heads)
            else:
                heapq.heapreplace(self._heads, (self._turn(head), head))
        return None

    def _head(self, tenant: str) -> Entry[T] | None:
        """Of the tenant's line; a line that is empty goes."""
        line = self._lines.get(tenant)
        head = line.first() if line is not None else None
        if head is None:
            self._lines.pop(tenant, None)
        return head

    def _sweep(self) -> None:
        heads = [head for tenant in list(self._lines) if (head := self._head(tenant)) is not None]
        self._heads = [(self._turn(head), head) for head in heads]
        heapq.heapify(self._heads)
        self._sweep_at = max(MIN_SWEEP, 2 * len(self._heads))


class Bucket(Generic[T]):
    """Entries whose needs have the same number of binary digits, and how long they are being passed."""

    def __init__(self, turn: Callable[[Entry[T]], Turn], is_alive: Callable[[Entry[T]], bool]) -> None:
        self.size = 0
        self._turn = turn
        self._by_turn: TurnHeap[T] = TurnHeap(turn, is_alive)
        self._by_need: LazyHeap[T] = LazyHeap(lambda e: e.need, is_alive)
        self._passed_s = float("-inf")  # since when entries are being passed
        self._passed_rank = (float("-inf"), 0)  # the last in rank that passed or was passed since

    def push(self, entry: Entry[T]) -> None:
        self.size += 1
        self._by_turn.push(entry)
        self._by_need.push(entry)

    def first(self) -> Entry[T] | None:
        return self._by_turn.first()

    def offers(self) -> list[Entry[T]]:
        """The first by turn and the smallest, once if they are the same."""
        first, smallest = self._by_turn.first(), self._by_need.first()
        if first is None or smallest is None:
            return []
        return [first] if first is smallest else [first, smallest]

    def note_passed(self, turn: Turn, now_s: float) -> None:
        """Something went in that turn. Starts or continues the clock if the first here was before it."""
        first = self.first()
        if first is None or self._turn(first) > turn:
            return
        rank = max(first.rank, turn[1])
        if self._is_passed(first):
            self._passed_rank = max(self._passed_rank, rank)
        else:
            self._passed_s, self._passed_rank = now_s, rank

    def passed_for_s(self, now_s: float) -> float:
        """How long the first entry has been passed by others; 0 if it was not."""
        first = self.first()
        return now_s - self._passed_s if first is not None and self._is_passed(first) else 0.0

    def _is_passed(self, entry: Entry[T]) -> bool:
        return entry.put_s <= self._passed_s and entry.rank <= self._passed_rank
