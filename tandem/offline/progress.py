"""How far a queue is: counts, rates and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

RATE_WINDOW_S = 30.0
BIN_S = 0.25  # lines that end within it are counted together, so that memory does not grow with the rate


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


@dataclass(slots=True)
class _Bin:
    """What ended within `BIN_S` from `begin_s`."""

    begin_s: float
    done: int = 0
    completed: int = 0
    output_tokens: int = 0


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
        self._recent: deque[_Bin] = deque()

    def note(self, output_tokens: int, *, is_failure: bool = False) -> None:
        """One line has its record."""
        self.completed += not is_failure
        self.failed += is_failure
        self.output_tokens += output_tokens
        self._forget()
        now_s = self._clock()
        if not self._recent or now_s - self._recent[-1].begin_s > BIN_S:
            self._recent.append(_Bin(now_s))
        latest = self._recent[-1]
        latest.done += 1
        latest.completed += not is_failure
        latest.output_tokens += output_tokens

    def snapshot(self) -> Snapshot:
        self._forget()
        elapsed_s = self._clock() - self._began_s
        span_s = max(min(elapsed_s, RATE_WINDOW_S), 1e-9)
        done_rate = sum(bin_.done for bin_ in self._recent) / span_s
        left = self.total - self.completed - self.failed
        return Snapshot(
            total=self.total,
            completed=self.completed,
            failed=self.failed,
            in_flight=self.in_flight,
            retries=self.retries,
            output_tokens=self.output_tokens,
            tokens_per_s=sum(bin_.output_tokens for bin_ in self._recent) / span_s,
            goodput_rps=sum(bin_.completed for bin_ in self._recent) / span_s,
            elapsed_s=elapsed_s,
            eta_s=left / done_rate if done_rate else None,
        )

    def _forget(self) -> None:
        while self._recent and self._clock() - self._recent[0].begin_s > RATE_WINDOW_S:
            self._recent.popleft()
