"""What a forward costs by its number of decode rows, measured on this machine at start-up."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner

ROWS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 3
CONTEXT = 64  # tokens each row sees


@dataclass(frozen=True, slots=True)
class ForwardCosts:
    """Seconds of a forward at the measured row counts; linear between them, in proportion beyond the last."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, num_rows: int) -> float:
        """Seconds of a forward of this many rows; none for no rows."""
        if num_rows <= 0:
            return 0.0
        index = bisect_left(self.rows, num_rows)
        if index == len(self.rows):
            return self.seconds[-1] * num_rows / self.rows[-1]
        if index == 0 or self.rows[index] == num_rows:
            return self.seconds[index]
        low, high = self.rows[index - 1], self.rows[index]
        share = (num_rows - low) / (high - low)
        return self.seconds[index - 1] + share * (self.seconds[index] - self.seconds[index - 1])


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
