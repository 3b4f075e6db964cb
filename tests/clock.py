"""A monotonic clock that moves only when a test says so."""

from __future__ import annotations


class ManualClock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, seconds
        self.now_s += seconds
