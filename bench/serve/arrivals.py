"""When requests are sent: seconds from the start of a run, fixed before it begins.

An open-loop schedule does not wait for answers, as users do not. So a service that falls behind shows its
queue in the latencies, instead of slowing the load down to what it can bear (coordinated omission).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from tandem.errors import ConfigError


class Arrival(Enum):
    """How requests come."""

    CLOSED = "closed"  # a fixed number at once; the next when one ends
    BURST = "burst"  # all at once
    CONSTANT = "constant"  # evenly
    POISSON = "poisson"  # independently of each other
    GAMMA = "gamma"  # in clumps below a burstiness of 1, more evenly above it
    RAMP = "ramp"  # evenly, from the rate to `ramp_to`
    TRACE = "trace"  # as the input file says


def arrival_named(name: str) -> Arrival:
    """Raises `ConfigError` for what is none."""
    if name not in [kind.value for kind in Arrival]:
        raise ConfigError(f"arrival must be one of {', '.join(kind.value for kind in Arrival)}, not {name}")
    return Arrival(name)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A kind of arrival with its figures. Raises `ConfigError` if they make no sense."""

    kind: Arrival
    rate: float = 1.0  # requests per second
    burstiness: float = 1.0  # shape of the gamma distribution; 1 is Poisson
    ramp_to: float = 1.0  # requests per second at the end of a ramp

    def __post_init__(self) -> None:
        for name in ("rate", "burstiness", "ramp_to"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, not {getattr(self, name)}")

    def times(self, count: int, seed: int) -> list[float]:
        """Arrival times in seconds, ascending from 0, of every kind but closed and trace."""
        if self.kind is Arrival.BURST:
            return [0.0] * count
        times, now_s = [], 0.0
        for gap_s in self._gaps(count, random.Random(seed)):
            times.append(now_s)
            now_s += gap_s
        return times

    def _gaps(self, count: int, rng: random.Random) -> Iterator[float]:
        """Seconds from each request to the next."""
        for number in range(count):
            match self.kind:
                case Arrival.CONSTANT:
                    yield 1 / self.rate
                case Arrival.POISSON:
                    yield rng.expovariate(self.rate)
                case Arrival.GAMMA:  # shape b and scale 1/(b rate): mean 1/rate, variance 1/(b rate²)
                    yield rng.gammavariate(self.burstiness, 1 / (self.burstiness * self.rate))
                case Arrival.RAMP:
                    yield 1 / (self.rate + (self.ramp_to - self.rate) * number / max(count - 1, 1))
                case _:
                    raise AssertionError(self.kind)
