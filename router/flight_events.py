"""What a flight tells of its request."""

from __future__ import annotations

from dataclasses import dataclass

from router.admission import Plan
from tandem.output import OutputDelta
from tandem.request import Timings, Usage


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request has its memory."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Completed:
    """The one successful end of a request."""

    delta: OutputDelta  # the last one: finish reason and matched stop
    usage: Usage
    timings: Timings


FlightEvent = Admitted | OutputDelta | Completed
