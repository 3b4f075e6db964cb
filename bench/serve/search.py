"""The highest rate a service holds within its limits: doubling until it fails, then bisection.

Below the first rate it halves until requests no longer meet: what fails alone fails at every rate.

A rate holds if the mean attainment of its trials reaches the target. Trials differ in their seeds. What can
no longer hold is stopped: a saturated service is not loaded further, and its backlog is not waited for.

The answer is a bracket, not a point: the last rate that held and the first that did not, with the spread of
the trials at the one that held (Student's t, 95 %). When time is over it is as wide as it is then.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

PRECISION = 0.1  # relative width of the bracket
MAX_DOUBLINGS = 12
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True, slots=True)
class Trial:
    """One run at one rate."""

    rate: float  # requests per second that were sent
    attainment: float
    goodput_rps: float
    client_bottleneck: bool
    most_in_flight: int
    stopped: bool = False  # as it could not hold any more
    errors: int = 0  # requests that were refused or failed, instead of being late


@dataclass(frozen=True, slots=True)
class Found:
    """Where the search ended. No `failing_rate`, if none failed: the client or time was the limit."""

    holding_rate: float | None  # None: not even the lowest rate that was tried held
    failing_rate: float | None
    goodput_rps: float
    goodput_ci: tuple[float, float]
    trials: list[Trial]


def always() -> bool:
    """A search that has all the time it needs."""
    return True


async def search(
    run: Callable[[float, int], Awaitable[Trial]],
    first_rate: float,
    attainment: float,
    num_trials: int,
    has_time: Callable[[], bool] = always,
) -> Found:
    """Find the bracket. `run` is called with a rate and the number of the trial; no further rate is tried
    once `has_time` says no."""
    trials: list[Trial] = []

    async def holds(rate: float) -> bool:
        missing = num_trials * (1 - attainment)  # that may be
        for number in range(num_trials):
            trials.append(await run(rate, number))
            missing -= 1 - trials[-1].attainment
            if missing < -1e-9:
                return False  # whatever the other trials would give
        return True

    low, high = await _bracket(holds, lambda: trials[-1].most_in_flight > 1, first_rate, has_time)
    while low is not None and high is not None and high / low > 1 + PRECISION and has_time():
        middle = math.sqrt(low * high)
        low, high = (middle, high) if await holds(middle) else (low, middle)
    at_low = [trial.goodput_rps for trial in trials if trial.rate == low]
    return Found(low, high, *_mean_and_interval(at_low), trials)


async def _bracket(
    holds: Callable[[float], Awaitable[bool]],
    overlapped: Callable[[], bool],
    rate: float,
    has_time: Callable[[], bool],
) -> tuple[float | None, float | None]:
    """A rate that holds and one that does not, a factor of two apart; None for one that was not found."""
    if not await holds(rate):
        while overlapped() and has_time():
            rate /= 2
            if await holds(rate):
                return rate, 2 * rate
        return None, rate
    for _ in range(MAX_DOUBLINGS):
        if not has_time():
            break
        rate *= 2
        if not await holds(rate):
            return rate / 2, rate
    return rate, None


def _mean_and_interval(values: list[float]) -> tuple[float, tuple[float, float]]:
    if not values:
        return 0.0, (0.0, 0.0)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, (0.0, math.inf)
    half = T_95.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, (max(mean - half, 0.0), mean + half)
