"""What a forward costs by its number of decode rows, measured at start-up and kept up to date."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner

ROWS = (1, 2, 4, 6, 8, 9, 12, 16, 24, 32, 64)  # with both sides of where a tile is full, and a row dear
REPEATS, MOST_REPEATS = 3, 10
PATIENCE_S = 0.5
FOLLOW = 0.2  # how far a timed forward moves the pace
RESHAPE = 0.2  # and the entry of its own row count, if others made the pace
MAX_SURPRISE = 1.5  # a forward that took longer than this many times its cost was disturbed
CONTEXT = 64  # tokens each row sees
SWEEP_BYTES = 8 << 20  # read before a timed forward: in a step, too, another model has just run


@dataclass(frozen=True, slots=True)
class ForwardCosts:
    """Seconds of a forward at the measured row counts."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]


class LiveCosts:
    """Start-up costs that follow what forwards take now: contexts grow, neighbours come and go.

    A machine that others use is slower and faster by half within seconds, and every forward with it. So a
    timed forward moves the `pace` of all entries, whatever its number of rows; and the entries it lies
    between, by its distance from them, as far as forwards of other sizes made the pace that it is compared
    with. Both asking and telling happen in nearly every step; asking does not grow with the entries.
    """

    def __init__(self, costs: ForwardCosts) -> None:
        self.pace = 1.0  # of now: seconds over those of the shape
        self._rows = costs.rows
        self._shape = list(costs.seconds)
        self._made = [0.0] * len(self._rows)  # the share of the pace that each entry's own forwards made
        self._shares: dict[int, tuple[tuple[int, float], ...]] = {}  # by rows, as they were asked for

    def at(self, num_rows: int) -> float:
        """Seconds of a forward of this many rows; none for no rows."""
        if num_rows <= 0:
            return 0.0
        seconds = 0.0
        for index, share in self._shares_of(num_rows):
            seconds += share * self._shape[index]
        return self.pace * seconds * max(num_rows / self._rows[-1], 1.0)

    def table(self, first: int, last: int) -> npt.NDArray[np.float64]:
        """Seconds of `first` to `last` rows, both included."""
        num_rows = np.arange(first, last + 1)
        seconds = self.pace * np.interp(num_rows, self._rows, self._shape)
        seconds *= np.maximum(num_rows / self._rows[-1], 1.0)
        return np.where(num_rows > 0, seconds, 0.0)

    def observe(self, num_rows: int, seconds: float) -> None:
        """A forward of this many rows took so long."""
        expected_s = self.at(num_rows)
        if expected_s <= 0 or seconds <= 0:
            return
        change = min(max(seconds / expected_s, 1 / MAX_SURPRISE), MAX_SURPRISE) - 1
        shares = self._shares_of(num_rows)
        by_others = 1 - sum(share * self._made[index] for index, share in shares)
        self.pace *= 1 + FOLLOW * change
        self._made = [(1 - FOLLOW) * made for made in self._made]
        for index, share in shares:
            self._shape[index] *= 1 + RESHAPE * by_others * share * change
            self._made[index] += FOLLOW * share

    def _shares_of(self, num_rows: int) -> tuple[tuple[int, float], ...]:
        """(index, share) pairs: how much entries say of a forward of this many rows, 1 in all."""
        if num_rows not in self._shares:
            self._shares[num_rows] = self._find_shares(num_rows)
        return self._shares[num_rows]

    def _find_shares(self, num_rows: int) -> tuple[tuple[int, float], ...]:
        rows, index = self._rows, bisect_left(self._rows, num_rows)
        if index == len(rows):
            return ((index - 1, 1.0),)
        if index == 0 or rows[index] == num_rows:
            return ((index, 1.0),)
        share = (num_rows - rows[index - 1]) / (rows[index] - rows[index - 1])
        return (index - 1, 1 - share), (index, share)


def measure_costs(model: ModelRunner, rows: Sequence[int] = ROWS, depth: int = 0) -> ForwardCosts:
    """Best of a few forwards of one row per sequence. Writes to the first blocks: nobody may own them yet.

    With a `depth` and a model that guesses in one call: of a forward in a guess of that many tokens.
    Caches are cold, as they are in a step.
    """
    size = model.cache.block_size
    depth = min(depth, model.cache.num_blocks * size) if model.can_guess else 0
    context = min(CONTEXT, model.cache.num_blocks * size) - max(depth, 1)
    table = range(-(-(context + max(depth, 1)) // size))
    batches = [[SequenceRows((0,), context, table)] * num_rows for num_rows in rows]
    swept = np.ones(SWEEP_BYTES, np.uint8)  # zeros that nobody wrote would all be one page
    best_s = [float("inf")] * len(batches)
    began_s = time.perf_counter()
    for number in range(MOST_REPEATS):
        if number >= REPEATS and time.perf_counter() - began_s > PATIENCE_S:
            break
        for index, batch in enumerate(batches):  # in turns: a disturbance hits all sizes alike
            swept.sum()
            best_s[index] = min(best_s[index], _seconds_per_forward(model, batch, depth))
    return ForwardCosts(tuple(rows), tuple(accumulate(best_s, max)))  # more rows never cost less


def _seconds_per_forward(model: ModelRunner, batch: list[SequenceRows], depth: int) -> float:
    began_s = time.perf_counter()
    if depth:
        model.guess(batch, [depth] * len(batch), [0.0] * len(batch))
    else:
        model.choose(batch)
    return (time.perf_counter() - began_s) / max(depth, 1)
