"""Stops asking a peer that does not answer, and tries it again now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_FAILURES = 3  # one after the other
PAUSE_S = 2.0  # then nobody asks for so long, and then one does


class Breaker:
    """Owned by one thread. Ask `lets_through`, and tell `note` what came of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_failures = 0
        self._closed_from_s = float("-inf")

    @property
    def is_open(self) -> bool:
        """Whether the last few failed, and none has gone well since."""
        return self._num_failures >= MAX_FAILURES

    def lets_through(self) -> bool:
        """Whether to ask now. While open, one in `PAUSE_S`."""
        if not self.is_open:
            return True
        now_s = self._clock()
        if now_s < self._closed_from_s:
            return False
        self._closed_from_s = now_s + PAUSE_S
        return True

    def note(self, *, is_good: bool) -> None:
        self._num_failures = 0 if is_good else self._num_failures + 1
        if self._num_failures == MAX_FAILURES:
            self._closed_from_s = self._clock() + PAUSE_S
