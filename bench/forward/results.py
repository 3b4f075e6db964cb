"""What a run was asked for, and what it found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.forward.cells import Beside, Output, Skipped, Timing
from bench.forward.traffic import Slope, Traffic, slope
from bench.limits import Limits


@dataclass(frozen=True, slots=True)
class Options:
    """What to run, and where."""

    shape: str
    full: bool
    rounds: int
    threads: int
    device: str
    out: Path
    plots: bool = True
    profile: Path | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was measured."""

    options: Options
    limits: Limits
    traffic: Traffic
    engine: str  # what ran, and why
    timings: list[Timing]
    skipped: list[Skipped]
    outputs: list[Output]
    beside: list[Beside]

    @property
    def slope(self) -> Slope | None:
        """Fitted to the fastest round of each cell, as the limits are the best of theirs."""
        steps = [
            (timing.cell.batch, timing.cell.tokens, timing.seconds.low)
            for timing in self.timings
            if timing.cell.phase == "decode"
        ]
        return slope(steps, self.traffic.geometry.kv_bytes_per_token(self.traffic.kv_dtype), self.limits)
