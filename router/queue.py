"""Requests that wait for memory: a bounded, fair priority queue without head-of-line blocking.

**Order.** Tenants that wait take turns, by what they were given (`router.fair_shares`): one that floods the
queue waits behind its own requests only. Within a tenant lower ranks go first. An entry's rank is the time it
was put minus `aging_s` for each step of its priority. So a higher priority goes first, and waiting `aging_s`
is worth one step. As priorities end at ±`MAX_PRIORITY`, what comes much later than an entry never ranks
before it. Order below means both: turn, then rank.

**What does not fit stops nobody.** `constrained_get` is asked with a condition, "does this fit now?".
Entries lie in geometric size buckets (need 1, 2–3, 4–7, …), and each bucket offers its first entry in order
and its smallest. If the condition is monotone (what fits a bigger need fits a smaller one) and any
entry meets it, one is returned, because the smallest entry of all is among those offered. Offered are
at most two per bucket, so a get costs the same in a queue of a hundred and of a hundred thousand.

**Nor is it passed for ever.** Small entries could keep memory so busy that a big one never fits. So once
the first of a bucket has been passed by an entry that came behind it in order, a clock runs for all of the
bucket that was passed, and after `starvation_s` nothing behind that first one is offered until it goes.
The trade: memory then idles while room for it gathers, for as long as the requests in its way run on.
So a big entry waits longer than its turn by about `starvation_s` and one drain, and small ones are
held up only then. An entry no worker could hold even when idle (`can_ever_fit`) holds up nobody.

**The bound is the back-pressure knob.** A full queue refuses at the door, with a hint from the measured
drain rate. A longer queue absorbs longer bursts and makes everybody in it wait longer; it adds no
throughput. Size it by Little's law: requests finished per second times the longest wait worth serving.

Owned by one thread. Knows nothing of workers, tokens or sockets.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from router.fair_shares import FairShares
from router.size_bucket import Bucket, Entry, LazyHeap, T, Turn
from tandem.errors import AlreadyExists, Overloaded

MAX_PRIORITY = 20  # beyond it a priority counts as this much, so that nobody waits for ever
MIN_RETRY_MS = 50
MAX_RETRY_MS = 30_000
DRAIN_WEIGHT = 0.1  # of the newest interval between two gets; the rest is history


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """The queue as an operator sees it. `waiting` maps a bucket's smallest need to its entries."""

    length: int
    waiting: dict[int, int]
    oldest_wait_s: float
    retry_after_ms: int


class RequestQueue(Generic[T]):
    """See the module's text for the rules it keeps."""

    def __init__(
        self,
        max_length: int,
        aging_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        starvation_s: float | None = None,
        can_ever_fit: Callable[[Entry[T]], bool] = lambda entry: True,
    ) -> None:
        self.max_length = max_length
        self.aging_s = aging_s
        self.starvation_s = 2 * aging_s if starvation_s is None else starvation_s
        self._clock = clock
        self._can_ever_fit = can_ever_fit
        self._numbers = itertools.count()
        self._entries: dict[str, Entry[T]] = {}
        self._buckets: dict[int, Bucket[T]] = {}
        self._shares = FairShares()
        self._by_age: LazyHeap[T] = LazyHeap(lambda e: e.put_s, self._is_alive)
        self._by_deadline: LazyHeap[T] = LazyHeap(lambda e: e.request.deadline_s, self._is_alive)
        self._drain = _DrainClock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def put(self, request: T, need: int, *, since_s: float | None = None) -> Entry[T]:
        """Add a request. Raises `QUEUE_FULL` with a retry hint, or `ID_IN_USE`.

        `since_s` is for a request that comes back because its worker was lost or refused: when it was
        first put. It takes its old place, and it is never refused for the bound: it was accepted
        once, and there are only as many as were running.
        """
        if since_s is None and len(self._entries) >= self.max_length:
            retry_ms = self.retry_after_ms()
            raise Overloaded("QUEUE_FULL", f"server is full; retry in {retry_ms} ms", retry_after_ms=retry_ms)
        put_s = self._clock() if since_s is None else since_s
        priority = max(-MAX_PRIORITY, min(request.priority, MAX_PRIORITY))
        entry = Entry(request, need, put_s, (put_s - priority * self.aging_s, next(self._numbers)))
        self._add(entry)
        return entry

    def constrained_get(self, condition: Callable[[Entry[T]], bool]) -> Entry[T] | None:
        """Remove and return the first offered entry that meets the condition, or None.

        The condition may take what the entry needs: an entry it said yes to is the one returned.
        Take expired entries out first; they are offered like any other.
        """
        if not self._entries:
            return None
        now_s = self._clock()
        for entry in self._offers(now_s):
            if condition(entry):
                turn = self._turn(entry)
                self._discard(entry)
                self._drain.note_get(now_s)
                for bucket in self._buckets.values():
                    bucket.note_passed(turn, now_s)
                self._shares.serve(entry.request.tenant, max(entry.need, 1))
                self._shares.leave(entry.request.tenant)
                return entry
        return None

    def remove(self, request_id: str) -> Entry[T] | None:
        """Take one out, because it was cancelled; None if it does not wait here."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._drop(entry)
        return entry

    def expired(self, now_s: float | None = None) -> list[Entry[T]]:
        """Remove and return what is past its deadline."""
        now_s = self._clock() if now_s is None else now_s
        found = []
        while (entry := self._by_deadline.first()) and entry.request.deadline_s <= now_s:
            self._drop(entry)
            found.append(entry)
        return found

    def next_deadline_s(self) -> float | None:
        """When `expired` has something to return next."""
        entry = self._by_deadline.first()
        return entry.request.deadline_s if entry else None

    def retry_after_ms(self) -> int:
        """About how long the queue as it stands takes to drain."""
        milliseconds = 1e3 * self._drain.interval_s(self._clock()) * len(self._entries)
        return int(min(max(milliseconds, MIN_RETRY_MS), MAX_RETRY_MS))

    def snapshot(self) -> QueueSnapshot:
        oldest = self._by_age.first()
        return QueueSnapshot(
            length=len(self._entries),
            waiting={1 << digits >> 1: b.size for digits, b in sorted(self._buckets.items()) if b.size},
            oldest_wait_s=self._clock() - oldest.put_s if oldest else 0.0,
            retry_after_ms=self.retry_after_ms(),
        )

    def _offers(self, now_s: float) -> list[Entry[T]]:
        """Candidates in order, cut off behind an entry that has been passed for too long."""
        offers = sorted((e for b in self._buckets.values() for e in b.offers()), key=self._turn)
        starving = [e for b in self._buckets.values() if (e := self._starving(b, now_s)) is not None]
        last = min(map(self._turn, starving), default=None)
        return offers if last is None else [entry for entry in offers if self._turn(entry) <= last]

    def _starving(self, bucket: Bucket[T], now_s: float) -> Entry[T] | None:
        if bucket.passed_for_s(now_s) <= self.starvation_s:
            return None
        first = bucket.first()
        return first if first is not None and self._can_ever_fit(first) else None

    def _add(self, entry: Entry[T]) -> None:
        if entry.request.request_id in self._entries:
            raise AlreadyExists("ID_IN_USE", "request_id is already running")
        if not self._entries:
            self._drain.note_busy(self._clock())
        self._entries[entry.request.request_id] = entry
        self._shares.enter(entry.request.tenant)
        digits = entry.need.bit_length()
        if digits not in self._buckets:
            self._buckets[digits] = Bucket(self._turn, self._is_alive)
        self._buckets[digits].push(entry)
        self._by_age.push(entry)
        self._by_deadline.push(entry)

    def _drop(self, entry: Entry[T]) -> None:
        """It goes without having been given anything."""
        self._discard(entry)
        self._shares.leave(entry.request.tenant)

    def _turn(self, entry: Entry[T]) -> Turn:
        return self._shares.start(entry.request.tenant), entry.rank

    def _discard(self, entry: Entry[T]) -> None:
        del self._entries[entry.request.request_id]
        self._buckets[entry.need.bit_length()].size -= 1

    def _is_alive(self, entry: Entry[T]) -> bool:
        return self._entries.get(entry.request.request_id) is entry


class _DrainClock:
    """The exponentially weighted time between gets, over the time that somebody was waiting."""

    def __init__(self) -> None:
        self._average_s: float | None = None
        self._since_s = 0.0  # the last get, or the end of the last time the queue was empty

    def note_busy(self, now_s: float) -> None:
        self._since_s = now_s

    def note_get(self, now_s: float) -> None:
        interval_s = now_s - self._since_s
        old_s = interval_s if self._average_s is None else self._average_s
        self._average_s = old_s + DRAIN_WEIGHT * (interval_s - old_s)
        self._since_s = now_s

    def interval_s(self, now_s: float) -> float:
        """Never less than the gap that is still open, so a stalled service says so."""
        return max(self._average_s or 0.0, now_s - self._since_s)
