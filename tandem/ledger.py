"""Who owns what, and what still holds it: the one place where a scarce resource is taken and given back.

A record is one (owner, generation) with an amount and a set of *holds*. The request itself is one
hold; a writer in flight is another. The amount returns to the pool only when the last hold is gone,
so memory is never handed out while somebody may still write to it. A release that comes late, twice
or for something unknown is counted and ignored. Block pools, the KV store and the router's credits
all keep their books here. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

REQUEST = "request"


@dataclass(frozen=True, slots=True)
class Owned:
    """One record as an audit shows it."""

    owner: str
    generation: int
    amount: int
    holds: tuple[str, ...]
    age_s: float


@dataclass(frozen=True, slots=True)
class PoolAudit:
    """The books of one pool. `orphans` are records whose owner is not alive."""

    pool: str
    unit: str
    total: int
    free: int
    owned: int
    owners: tuple[Owned, ...]
    orphans: tuple[Owned, ...]
    late_operations: int

    @property
    def is_balanced(self) -> bool:
        return self.free + self.owned == self.total == self.free + sum(o.amount for o in self.owners)

    @property
    def is_empty(self) -> bool:
        """Sound, and nothing is owned: what every pool must be when no request runs."""
        return self.is_balanced and self.owned == 0


@dataclass(slots=True)
class _Record:
    amount: int
    taken_s: float
    holds: set[str] = field(default_factory=set)


class Ledger:
    """Books over `total` units of one resource."""

    def __init__(self, pool: str, unit: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.pool = pool
        self.unit = unit
        self.total = total
        self.late_operations = 0
        self._clock = clock
        self._owned = 0
        self._records: dict[tuple[str, int], _Record] = {}
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return self.total - self._owned

    def reserve(self, owner: str, amount: int, *, generation: int = 0, hold: str = REQUEST) -> bool:
        """Take all of `amount` or nothing. One live record per (owner, generation): a second is refused."""
        assert amount >= 0, amount
        with self._lock:
            if amount > self.free or (owner, generation) in self._records:
                return False
            self._records[owner, generation] = _Record(amount, self._clock(), {hold})
            self._owned += amount
            return True

    def hold(self, owner: str, hold: str, *, generation: int = 0) -> bool:
        """Add a hold to a live record. False if the record is gone: the caller came too late."""
        with self._lock:
            record = self._records.get((owner, generation))
            if record is None:
                self.late_operations += 1
                return False
            record.holds.add(hold)
            return True

    def release(self, owner: str, *, generation: int = 0, hold: str = REQUEST) -> int:
        """Drop one hold; returns the units that became free, which is 0 while another hold remains."""
        with self._lock:
            record = self._records.get((owner, generation))
            if record is None or hold not in record.holds:
                self.late_operations += 1
                return 0
            record.holds.remove(hold)
            if record.holds:
                return 0
            del self._records[owner, generation]
            self._owned -= record.amount
            return record.amount

    def amount(self, owner: str, *, generation: int = 0) -> int:
        """Units the record holds; 0 if there is none."""
        with self._lock:
            record = self._records.get((owner, generation))
            return record.amount if record else 0

    def audit(self, live_owners: Collection[str] | None = None) -> PoolAudit:
        """The books now. With `live_owners`, records of anybody else are listed as orphans."""
        with self._lock:
            now_s = self._clock()
            owners = tuple(
                Owned(owner, generation, record.amount, tuple(sorted(record.holds)), now_s - record.taken_s)
                for (owner, generation), record in self._records.items()
            )
            orphans = tuple(o for o in owners if live_owners is not None and o.owner not in live_owners)
            return PoolAudit(
                self.pool,
                self.unit,
                self.total,
                self.free,
                self._owned,
                owners,
                orphans,
                self.late_operations,
            )
