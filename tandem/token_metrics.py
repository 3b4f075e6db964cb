"""Figures that change with every token: plain numbers, put into Prometheus' form when somebody scrapes.

A counter and a histogram of prometheus_client take a lock each time, which at thousands of tokens a second is
a good part of what the router does for one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenMetrics(Collector):
    """Deliveries of output tokens and the gaps between them. `bounds_s` are the histogram's upper ones."""

    def __init__(self, bounds_s: Sequence[float], itl_limit_s: float) -> None:
        self._bounds_s = bounds_s
        self._itl_limit_s = itl_limit_s or float("inf")
        self._in_bucket = [0] * (len(bounds_s) + 1)
        self._gaps_s = 0.0
        self._num_tokens = self._num_deliveries = 0
        self.num_gaps = self.num_late = 0  # between deliveries, and of them over the limit

    def note_first(self, num_tokens: int) -> None:
        """The first delivery of a completion."""
        self._num_tokens += num_tokens
        self._num_deliveries += 1

    def note(self, num_tokens: int, gap_s: float) -> None:
        """A delivery `gap_s` after the one before."""
        self._num_tokens += num_tokens
        self._num_deliveries += 1
        self._in_bucket[bisect_left(self._bounds_s, gap_s)] += 1
        self._gaps_s += gap_s
        self.num_gaps += 1
        if gap_s > self._itl_limit_s:
            self.num_late += 1

    def describe(self) -> Iterable[Metric]:
        """The names do not depend on a first scrape."""
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        yield _counter("output_tokens", "Output tokens delivered.", self._num_tokens)
        deliveries = "Deliveries of one or more output tokens; several share one with speculation."
        yield _counter("token_deliveries", deliveries, self._num_deliveries)
        missed = "Gaps longer than router.itl_limit_s; none where it is 0."
        yield _counter("inter_token_latency_missed", missed, self.num_late)
        gaps = HistogramMetricFamily(
            "tandem_inter_token_latency_seconds",
            "Gap between consecutive deliveries of a completion; tokens that speculation brings "
            "together share one gap.",
        )
        names = map(floatToGoString, (*self._bounds_s, float("inf")))
        buckets = list(zip(names, accumulate(map(float, self._in_bucket)), strict=True))
        gaps.add_metric([], buckets, self._gaps_s)
        yield gaps


def _counter(name: str, what: str, value: int) -> Metric:
    return CounterMetricFamily(f"tandem_{name}", what, value=value)
