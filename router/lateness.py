"""The share of tokens that came late, over the last seconds: what autoscaling of decode goes by."""

from __future__ import annotations

from collections import deque

WINDOW_S = 10.0
SAMPLE_S = 0.5


class LateShare:
    """Two running counts, of gaps between deliveries and of those over the limit, sampled by the clock."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int, int]] = deque([(float("-inf"), 0, 0)])

    def sample(self, now_s: float, num_gaps: int, num_late: int) -> None:
        """The counts as they are now; one that follows another closely is dropped."""
        if now_s - self._samples[-1][0] < SAMPLE_S:
            return
        self._samples.append((now_s, num_gaps, num_late))
        while self._samples[1][0] <= now_s - self._window_s:
            self._samples.popleft()

    @property
    def value(self) -> float:
        """Late gaps / gaps within the window; 0 if there were none."""
        (_, gaps_before, late_before), (_, gaps, late) = self._samples[0], self._samples[-1]
        return (late - late_before) / (gaps - gaps_before) if gaps > gaps_before else 0.0
