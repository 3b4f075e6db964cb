"""How far a queue is: counts, rates and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

RATE_WINDOW_S = 30.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look. Rates are over the last half minute; goodput is completed requests per second."""

    total: int
    completed: int
    failed: int
    in_flight: int
    retries: int
    output_tokens: int  # of this run
    tokens_per_s: float
    goodput_rps: float
    elapsed_s: float  # of this run
    eta_s: float | None  # None until a rate is known

    @property
    def done(self) -> int:
        return self.completed + self.failed


class Progress:
    """Counts of one run, on top of what earlier runs finished."""

    def __init__(
        self, total: int, completed: int, failed: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.completed = completed
        self.failed = failed
        self.in_flight = 0
        self.retries = 0
        self.output_tokens = 0
        self._clock = clock
        self._began_s = clock()
        self._recent: deque[tuple[float, int, bool]] = deque()  # when, output tokens, completed

    def note(self, output_tokens: int, *, is_failure: bool = False) -> None:
        """One line has its record."""
        self.completed += not is_failure
        self.failed += is_failure
        self.output_tokens += output_tokens
        self._recent.append((self._clock(), output_tokens, not is_failure))
        self._forget()

    def snapshot(self) -> Snapshot:
        self._forget()
        elapsed_s = self._clock() - self._began_s
        span_s = max(min(elapsed_s, RATE_WINDOW_S), 1e-9)
        done_rate = len(self._recent) / span_s
        left = self.total - self.completed - self.failed
        return Snapshot(
            total=self.total,
            completed=self.completed,
            failed=self.failed,
            in_flight=self.in_flight,
            retries=self.retries,
            output_tokens=self.output_tokens,
            tokens_per_s=sum(tokens for _, tokens, _ in self._recent) / span_s,
            goodput_rps=sum(completed for _, _, completed in self._recent) / span_s,
            elapsed_s=elapsed_s,
            eta_s=left / done_rate if done_rate else None,
        )

    def _forget(self) -> None:
        while self._recent and self._clock() - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()
