"""From samples to a verdict: memory per process and the decode step must not grow with finished requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

MIB = 1 << 20
WARM_UP_SHARE, END_SHARE = 0.2, 0.1  # of the requests: before memory is judged; of either end of the steps
MAX_MIB_PER_1000 = 1.0
MAX_STEP_CHANGE = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """After so many finished requests, with nothing running."""

    requests: int
    rss: dict[str, int]  # bytes by process
    step_s: float  # of one sequence, the fastest of the probes: neighbours only ever add


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a soak showed."""

    mib_per_1000: dict[str, float]  # by process, least squares after the warm-up
    step_change: float  # the last steps over the first after the warm-up, less one
    owned: list[str]  # what the audit still found at the end
    failures: list[str]

    @property
    def is_flat(self) -> bool:
        """Shrinking and getting faster are fine."""
        grows = any(slope >= MAX_MIB_PER_1000 for slope in self.mib_per_1000.values())
        return not (grows or self.step_change > MAX_STEP_CHANGE or self.owned or self.failures)


def judge(samples: Sequence[Sample], owned: list[str], failures: list[str]) -> Verdict:
    """The samples cover the whole run; ValueError if too few of them lie after the warm-up."""
    total = samples[-1].requests
    kept = [sample for sample in samples if sample.requests >= WARM_UP_SHARE * total]
    if len(kept) < 2:
        raise ValueError("a soak needs two samples after its warm-up; sample more often")
    names = [name for name in kept[0].rss if all(name in sample.rss for sample in kept)]
    growth = {name: 1000 * _slope(kept, name) / MIB for name in names}
    window = END_SHARE * total
    first = min(s.step_s for s in kept if s.requests <= kept[0].requests + window)
    last = min(s.step_s for s in kept if s.requests >= total - window)
    return Verdict(growth, last / first - 1, owned, failures)


def _slope(samples: Sequence[Sample], name: str) -> float:
    """Bytes per request."""
    middle, level = fmean(s.requests for s in samples), fmean(s.rss[name] for s in samples)
    along = sum((s.requests - middle) ** 2 for s in samples)
    return sum((s.requests - middle) * (s.rss[name] - level) for s in samples) / along
