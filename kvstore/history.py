"""Which attempts the store has seen, so that a late one is told apart from one nobody ever made.

Bounded in number and age: an attempt that is forgotten is older than any request may run.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

REMEMBER_S = 600.0
MAX_REMEMBERED = 100_000


@dataclass(frozen=True, slots=True)
class Seen:
    """The highest attempt at an object so far."""

    tenant: str
    epoch: int
    at_s: float


class History:
    """The latest attempt of each object id, oldest first."""

    def __init__(self, remember_s: float = REMEMBER_S, max_remembered: int = MAX_REMEMBERED) -> None:
        self._remember_s = remember_s
        self._max_remembered = max_remembered
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def latest(self, object_id: bytes) -> Seen | None:
        return self._seen.get(object_id)

    def note(self, object_id: bytes, tenant: str, epoch: int, now_s: float) -> None:
        """Remember this attempt, or that it was alive until now, unless a later one is known."""
        latest = self._seen.get(object_id)
        if latest is None or epoch >= latest.epoch:
            self._seen[object_id] = Seen(tenant, epoch, now_s)
            self._seen.move_to_end(object_id)
        self._forget(now_s)

    def _forget(self, now_s: float) -> None:
        while self._seen:
            oldest_id, oldest = next(iter(self._seen.items()))
            if len(self._seen) <= self._max_remembered and now_s - oldest.at_s <= self._remember_s:
                return
            del self._seen[oldest_id]
