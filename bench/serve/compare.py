"""Two load tests against each other: did anything get worse by more than chance and more than a margin?

Two runs of equal options and seed sent the same requests, so they are compared request by request: what a
long prompt costs in one it costs in the other, and cancels out. Others are compared as two samples.
Intervals are of 95 %, by bootstrap (Efron, 1979): percentiles of the figure over resampled requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.serve.metrics import Limits, Slo
from bench.serve.record import Outcome, RequestRecord
from bench.serve.slo import Slos
from tandem.errors import ConfigError

RESAMPLES = 2000
PICKS_AT_ONCE = 1_000_000  # bounds the memory of a resampling
MIN_REQUESTS = 20  # fewer say nothing about chance
LATENCIES: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft_ms": lambda record: record.ttft_ms,
    "tpot_ms": lambda record: record.tpot_ms,
    "e2e_ms": lambda record: record.e2e_ms,
}

Values = NDArray[np.float64]  # [num_requests]
Records = Sequence[RequestRecord]


@dataclass(frozen=True, slots=True)
class Change:
    """One figure from A to B, where less is better.

    Of a latency, `a` and `b` are medians and the change is relative. Of the share of requests outside the
    limits, the change is a difference.
    """

    figure: str
    a: float
    b: float
    change: float
    low: float
    high: float
    verdict: str  # worse | better | same


@dataclass(frozen=True, slots=True)
class Comparison:
    """`same_texts` is the share of requests with equal texts, of those answered in both; None if unpaired."""

    is_paired: bool
    changes: list[Change]
    same_texts: float | None
    warnings: list[str]

    @property
    def is_worse(self) -> bool:
        return any(change.verdict == "worse" for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_worse": self.is_worse}


def compare(a: dict[str, Any], b: dict[str, Any], margin: float) -> Comparison:
    """Of two documents of `bench.serve.report`. Raises `ConfigError` if they are too small to compare."""
    ours, theirs = ([RequestRecord.from_json(one) for one in content["records"]] for content in (a, b))
    if min(len(ours), len(theirs)) < MIN_REQUESTS:
        raise ConfigError(f"each run needs at least {MIN_REQUESTS} requests to be compared")
    is_paired = a["options"] == b["options"] and len(ours) == len(theirs)
    judge = _Judge(is_paired, margin)
    changes = [judge.latency(name, figure, ours, theirs) for name, figure in LATENCIES.items()]
    changes.append(judge.outside_limits(_limits(a["options"]), ours, theirs))
    late = [name for name, run in (("A", a), ("B", b)) if run["summary"]["client_bottleneck"]]
    return Comparison(
        is_paired,
        changes,
        _same_texts(ours, theirs) if is_paired else None,
        [f"the client was the bottleneck in {name}: its latencies are not the service's" for name in late],
    )


@dataclass(frozen=True, slots=True)
class _Judge:
    """Compares samples; the same samples get the same answer."""

    is_paired: bool
    margin: float
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def latency(
        self, name: str, figure: Callable[[RequestRecord], float | None], ours: Records, theirs: Records
    ) -> Change:
        """Of the geometric mean over pairs, or between the medians of two samples."""
        a, b = ([_value(figure, record) for record in side] for side in (ours, theirs))
        if self.is_paired:
            both = [(x, y) for x, y in zip(a, b, strict=True) if x and y]
            a, b = [x for x, _ in both], [y for _, y in both]
        first, second = (np.array([x for x in side if x]) for side in (a, b))
        if not len(first) or not len(second):
            return Change(name, 0.0, 0.0, 0.0, 0.0, 0.0, "same")
        logs = self._bootstrap(np.log(first), np.log(second), np.median)
        change, low, high = (float(np.expm1(value)) for value in logs)
        return self._judged(name, float(np.median(first)), float(np.median(second)), change, low, high)

    def outside_limits(self, slo: Limits, ours: Records, theirs: Records) -> Change:
        a, b = (np.array([float(not slo.is_met(record)) for record in side]) for side in (ours, theirs))
        change = self._bootstrap(a, b, np.mean)
        return self._judged("outside_limits", float(a.mean()), float(b.mean()), *change)

    def _bootstrap(self, a: Values, b: Values, middle: Callable[..., Any]) -> tuple[float, float, float]:
        """B's middle minus A's, or the mean difference of pairs, with its interval."""
        if self.is_paired:
            estimate, samples = float((b - a).mean()), self._resampled(b - a, np.mean)
        else:
            estimate = float(middle(b) - middle(a))
            samples = self._resampled(b, middle) - self._resampled(a, middle)
        low, high = np.percentile(samples, [2.5, 97.5])
        return estimate, float(low), float(high)

    def _resampled(self, values: Values, middle: Callable[..., Any]) -> Values:
        """The middle of each resample. [RESAMPLES]"""
        size = len(values)
        rows = max(PICKS_AT_ONCE // size, 1)
        groups = [
            middle(values[self.rng.integers(0, size, (min(rows, RESAMPLES - done), size))], axis=1)
            for done in range(0, RESAMPLES, rows)
        ]
        return np.concatenate(groups)

    def _judged(self, name: str, a: float, b: float, change: float, low: float, high: float) -> Change:
        verdict = "worse" if low > self.margin else "better" if high < -self.margin else "same"
        return Change(name, a, b, change, low, high, verdict)


def _limits(options: dict[str, Any]) -> Slos:
    by_class = {name: Slo(**limits) for name, limits in options.get("class_slos", {}).items()}
    return Slos(Slo(**options["slo"]), by_class)


def _value(figure: Callable[[RequestRecord], float | None], record: RequestRecord) -> float | None:
    return figure(record) if record.outcome is Outcome.OK else None


def _same_texts(ours: Records, theirs: Records) -> float | None:
    both = [(x, y) for x, y in zip(ours, theirs, strict=True) if x.outcome is y.outcome is Outcome.OK]
    return sum(x.digest == y.digest for x, y in both) / len(both) if both else None
