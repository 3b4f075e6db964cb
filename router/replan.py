"""How often a request may be planned again: once per stage, and from a budget all requests share.

The budget is a token bucket, one token a second plus a tenth of a token per admitted request, so that
a sick cluster is not drowned in second attempts. Pure; the caller passes the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PER_ADMITTED = 0.1
PER_SECOND = 1.0
CAPACITY = 100.0


class ReplanBudget:
    """The shared bucket. It starts with ten tokens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = 10.0
        self._updated_s = clock()

    def note_admitted(self) -> None:
        self._tokens = min(self._tokens + PER_ADMITTED, CAPACITY)

    def take(self) -> bool:
        """Spend one token; False if there is none."""
        now_s = self._clock()
        self._tokens = min(self._tokens + PER_SECOND * (now_s - self._updated_s), CAPACITY)
        self._updated_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
