"""From samples to a verdict: memory per process and the decode step must not grow with finished requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.measure import Spread

MIB = 1 << 20
WARM_UP_SHARE = 0.2  # of the requests: before memory is judged
MAX_MIB_PER_1000 = 1.0
MAX_STEP_RATIO = 1.05


@dataclass(frozen=True, slots=True)
class Sample:
    """After so many finished requests, with nothing running."""

    requests: int
    rss: dict[str, int]  # bytes by process
    step_s: float  # of one sequence, the fastest of the probes, to be looked at: neighbours change it


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a soak showed."""

    mib_per_1000: dict[str, float]  # by process, least squares after the warm-up
    step_ratio: Spread  # decode steps after the last request over those of a fresh service, in turns
    owned: list[str]  # what the audit still found at the end
    failures: list[str]

    @property
    def is_flat(self) -> bool:
        """Shrinking and getting faster are fine."""
        grows = any(slope >= MAX_MIB_PER_1000 for slope in self.mib_per_1000.values())
        return not (grows or self.step_ratio.median > MAX_STEP_RATIO or self.owned or self.failures)


def judge(samples: Sequence[Sample], step_ratio: Spread, owned: list[str], failures: list[str]) -> Verdict:
    """The samples cover the whole run; ValueError if too few of them lie after the warm-up."""
    total = samples[-1].requests
    kept = [sample for sample in samples if sample.requests >= WARM_UP_SHARE * total]
    if len(kept) < 2:
        raise ValueError("a soak needs two samples after its warm-up; sample more often")
    names = [name for name in kept[0].rss if all(name in sample.rss for sample in kept)]
    growth = {name: 1000 * _slope(kept, name) / MIB for name in names}
    return Verdict(growth, step_ratio, owned, failures)


def _slope(samples: Sequence[Sample], name: str) -> float:
    """Bytes per request."""
    middle, level = fmean(s.requests for s in samples), fmean(s.rss[name] for s in samples)
    along = sum((s.requests - middle) ** 2 for s in samples)
    return sum((s.requests - middle) * (s.rss[name] - level) for s in samples) / along
