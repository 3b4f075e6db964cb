"""What a step costs and brings for every number of draft tokens, from measured forwards."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from decode_worker.lookahead import StepOutcome
from tandem.engine.costs import FOLLOW, MAX_SURPRISE, ForwardCosts, LiveCosts

LEAST = 0.1  # of a guess of one token is its forward at least, whatever noise says
MAX_ACCEPTANCE = 0.98  # a rate of 1 would promise too much of the places far ahead

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """A guess of d tokens for n sequences takes `start_s` and d times `forward` of n rows."""

    start_s: float
    forward: ForwardCosts

    @classmethod
    def of(cls, single: ForwardCosts, deep: ForwardCosts, depth: int) -> DraftCosts:
        """From guesses of one token and of `depth` tokens, per forward."""
        forward_s = [(depth * d - s) / (depth - 1) for s, d in zip(single.seconds, deep.seconds, strict=True)]
        sane = [min(max(f, LEAST * s), s) for s, f in zip(single.seconds, forward_s, strict=True)]
        return cls(single.seconds[0] - sane[0], ForwardCosts(single.rows, tuple(accumulate(sane, max))))


@dataclass(frozen=True, slots=True)
class Division:
    """How many tokens each sequence drafts, and tokens per second over those of plain decoding."""

    counts: npt.NDArray[np.int64]  # [sequences]
    gain: float


class StepCosts:
    """Follows the forwards of target and draft. No draft costs: guesses cost nothing that counts."""

    def __init__(self, target: ForwardCosts, draft: DraftCosts | None) -> None:
        self._target = LiveCosts(target)
        self._draft = LiveCosts(draft.forward) if draft else None
        self._draft_start_s = draft.start_s if draft else 0.0

    def plain_s(self, num_sequences: int) -> float:
        """Seconds of a plain step."""
        return self._target.at(num_sequences)

    def read_s(self, num_tokens: int) -> float:
        """Seconds in which the draft reads so many tokens."""
        return self._draft.at(num_tokens) if self._draft else 0.0

    def observe(self, outcome: StepOutcome) -> None:
        """A forward of the target, and a guess of the draft if any sequence drafted: what it took longer
        than expected, its start and its forwards did in equal parts."""
        self._target.observe(outcome.num_rows, outcome.verify_s)
        count, depth = outcome.num_drafting, outcome.depth
        if self._draft is None or not count:
            return
        forward_s = self._draft.at(count)
        change = outcome.draft_s / (self._draft_start_s + depth * forward_s)
        self._draft.observe(count, forward_s * change)
        self._draft_start_s *= 1 + FOLLOW * (min(max(change, 1 / MAX_SURPRISE), MAX_SURPRISE) - 1)

    def best(self, rates: Floats, most: int) -> Division:
        """The division of draft tokens that brings the most, at acceptance `rates` [sequences] below 1.

        Each greatest depth is tried by itself, because a deeper place costs one more forward of the draft.
        """
        depths = range(1, most + 1) if len(rates) > 1 else (most,)
        return max((self._best_within(rates, depth) for depth in depths), key=lambda division: division.gain)

    def _best_within(self, rates: Floats, most: int) -> Division:
        """The most probable places are filled first, up to the number that brings the most per second."""
        count, depths = len(rates), np.arange(1, most + 1)
        stands = (rates[None] ** depths[:, None]).ravel()  # place 1 of all sequences, then place 2, …
        order = np.argsort(-stands, kind="stable")
        tokens = count + np.cumsum(stands[order])
        verify_s = self._target.table(count + 1, count + len(order))
        seconds = verify_s + self._draft_seconds(order // count, count, most)
        taken = int((tokens / seconds).argmax())
        counts = np.bincount(order[: taken + 1] % count, minlength=count)
        return Division(counts, float(tokens[taken] / seconds[taken] * self.plain_s(count) / count))

    def worth(self, division: Division, rate: float) -> float:
        """The chance of being right so far with which a sequence of this division gains by one more token, if
        that stands with probability `rate`: what its forward and its row cost over what a token costs."""
        count, rows = len(division.counts), len(division.counts) + int(division.counts.sum())
        token_s = self.plain_s(count) / (count * division.gain)
        row_s = (self._target.at(rows + count) - self._target.at(rows)) / count
        draft_s = self._draft.at(count) / count if self._draft else 0.0
        return min((draft_s + row_s) / (token_s * rate), 1.0)

    def best_gain(self, acceptance: float, num_sequences: int, most: int) -> float:
        """Tokens per second over plain decoding at the best number of draft tokens; 1 where none pays."""
        rates = np.full(num_sequences, min(acceptance, MAX_ACCEPTANCE))
        return max(1.0, self.best(rates, most).gain)

    def needed_acceptance(self, num_sequences: int, most: int) -> float:
        """The lowest acceptance rate at which drafting pays; 1 if none does."""
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            if self.best_gain(middle, num_sequences, most) > 1:
                high = middle
            else:
                low = middle
        return high if high < 1.0 else 1.0

    def _draft_seconds(self, places: npt.NDArray[np.int64], num_sequences: int, most: int) -> Floats:
        """Seconds of drafting when the first n of these places are filled: a start, one forward per depth."""
        if self._draft is None:
            return np.zeros(len(places))
        forward_s = self._draft.table(0, num_sequences)
        filled = np.cumsum(places[:, None] == np.arange(most), axis=0)  # [n, depth]: rows of each forward
        seconds: Floats = self._draft_start_s + forward_s[filled].sum(1)
        return seconds
