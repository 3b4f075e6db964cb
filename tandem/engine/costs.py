"""What a forward costs by its number of decode rows, measured at start-up and kept up to date."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner

ROWS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 3
FOLLOW = 0.1  # how far a timed forward moves the entry of its own row count
FOLLOW_ALL = 0.02  # and the far ones
MAX_SURPRISE = 4.0  # a forward that took longer than this many times its cost was disturbed
CONTEXT = 64  # tokens each row sees


@dataclass(frozen=True, slots=True)
class ForwardCosts:
    """Seconds of a forward at the measured row counts."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]


class LiveCosts:
    """Start-up costs that follow what forwards take now: contexts grow, neighbours come and go.

    A timed forward moves the entries beside its row count most, and all others a little.
    """

    def __init__(self, costs: ForwardCosts) -> None:
        self._rows = np.array(costs.rows, np.float64)
        self._seconds = np.array(costs.seconds, np.float64)

    def at(self, num_rows: int) -> float:
        """Seconds of a forward of this many rows; none for no rows."""
        return float(self.table(np.array([num_rows]))[0])

    def table(self, num_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Seconds for each row count: linear between entries, in proportion beyond the last, 0 for none."""
        seconds = np.interp(num_rows, self._rows, self._seconds)
        seconds *= np.maximum(num_rows / self._rows[-1], 1.0)
        return np.where(num_rows > 0, seconds, 0.0)

    def observe(self, num_rows: int, seconds: float) -> None:
        """A forward of this many rows took so long."""
        expected_s = self.at(num_rows)
        if expected_s <= 0 or seconds <= 0:
            return
        change = min(max(seconds / expected_s, 1 / MAX_SURPRISE), MAX_SURPRISE) - 1
        distance = np.abs(np.log2(self._rows / max(num_rows, 1)))
        self._seconds *= 1 + change * np.where(distance < 1, FOLLOW * (1 - distance), FOLLOW_ALL)


def measure_costs(model: ModelRunner, rows: Sequence[int] = ROWS) -> ForwardCosts:
    """Best of a few forwards of one row per sequence. Writes to the first blocks: nobody may own them yet."""
    block_size = model.cache.block_size
    context = min(CONTEXT, model.cache.num_blocks * block_size) - 1
    table = range(-(-(context + 1) // block_size))
    measured = []
    for num_rows in rows:
        # All rows share one table: they write the same slot, which costs what different slots cost.
        batch = [SequenceRows((0,), context, table)] * num_rows
        best_s = float("inf")
        for _ in range(REPEATS):
            began_s = time.perf_counter()
            model.forward(model.batch(batch))
            best_s = min(best_s, time.perf_counter() - began_s)
        measured.append(best_s)
    return ForwardCosts(tuple(rows), tuple(measured))
