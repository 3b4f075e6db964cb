"""What a step costs and brings for every number of draft tokens, from measured forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from decode_worker.lookahead import StepOutcome
from tandem.engine.costs import FOLLOW, MAX_SURPRISE, ForwardCosts, LiveCosts

LEAST = 0.1  # of a guess of one token is its forward at least, whatever noise says
MORE_ROWS = 4  # at least, over which the price of one is averaged
ROWS_FADE = 0.05  # of a step, in the rows of late
MAX_ACCEPTANCE = 0.98  # a rate of 1 would promise too much of the places far ahead


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

    counts: list[int]  # [sequences]
    gain: float


class StepCosts:
    """Follows the forwards of target and draft. No draft costs: guesses cost nothing that counts."""

    def __init__(self, target: ForwardCosts, draft: DraftCosts | None) -> None:
        self._target = LiveCosts(target)
        self._draft = LiveCosts(draft.forward) if draft else None
        self._draft_start_s = draft.start_s if draft else 0.0
        self._rows_each = 0.0  # of a sequence that drafts, of late; 0 while none has

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
        if not count:
            return
        rows_each = outcome.num_rows / len(outcome.advances)
        self._rows_each += ROWS_FADE * (rows_each - self._rows_each) if self._rows_each else rows_each
        if self._draft is None:
            return
        forward_s = self._draft.at(count)
        change = outcome.draft_s / (self._draft_start_s + depth * forward_s)
        self._draft.observe(count, forward_s * change)
        self._draft_start_s *= 1 + FOLLOW * (min(max(change, 1 / MAX_SURPRISE), MAX_SURPRISE) - 1)

    def best(self, rates: Sequence[float], most: int) -> Division:
        """The division of draft tokens that brings the most, at acceptance `rates` [sequences] below 1.

        Each greatest depth is tried by itself, because a deeper place costs one more forward of the draft,
        until two in a row are not worth reaching. Arrays would be too small here to be worth their calls.
        """
        count = len(rates)
        plain_s = self.plain_s(count)  # is followed more closely than others, which may seem to cost less
        verify_s = [max(s, plain_s) for s in self._target.table(count + 1, count * (1 + most)).tolist()]
        guess_s = self._draft.table(0, count).tolist() if self._draft else [0.0] * (count + 1)
        best = Division([0] * count, 0.0)
        for depth in range(1, most + 1) if count > 1 else (most,):
            division = self._best_within(rates, depth, plain_s, verify_s, guess_s)
            best = max(best, division, key=lambda division: division.gain)
            if max(division.counts) < depth - 1:
                break
        return best

    def _best_within(
        self, rates: Sequence[float], most: int, plain_s: float, verify_s: list[float], guess_s: list[float]
    ) -> Division:
        """The most probable places are filled first, up to the number that brings the most per second.

        `verify_s` by draft tokens, from one on; `guess_s`, a forward of the draft, by rows, from none on.
        """
        count, tokens, draft_s = len(rates), float(len(rates)), self._draft_start_s
        rows = [0] * (most + 1)  # of the forward at each depth
        places = sorted((-(rate**d), d, i) for d in range(1, most + 1) for i, rate in enumerate(rates))
        per_s, taken = 0.0, 0
        for number, (stands, depth, _) in enumerate(places):
            tokens -= stands
            draft_s += guess_s[rows[depth] + 1] - guess_s[rows[depth]]
            rows[depth] += 1
            if tokens > per_s * (verify_s[number] + draft_s):
                per_s, taken = tokens / (verify_s[number] + draft_s), number + 1
        counts = [0] * count
        for _, _, index in places[:taken]:
            counts[index] += 1
        return Division(counts, per_s * plain_s / count)

    def worth(self, division: Division, rate: float) -> float:
        """The chance of being right so far with which a sequence of this division gains by one more token, if
        that stands with probability `rate`: what its forward and its row cost over what a token costs.

        That row comes behind those of the division, or where steps have had fewer of late, behind these. It
        costs what some more would on average: the difference of two entries side by side is mostly noise.
        """
        count = len(division.counts)
        planned_each = 1 + sum(division.counts) / count
        rows = round(count * min(planned_each, self._rows_each or planned_each))
        more = max(count, MORE_ROWS)
        token_s = self.plain_s(count) / (count * division.gain)
        row_s = max(self._target.at(rows + more) - self._target.at(rows), 0.0) / more
        draft_s = self._draft.at(count) / count if self._draft else 0.0
        return min((draft_s + row_s) / (token_s * rate), 1.0)

    def best_gain(self, acceptance: float, num_sequences: int, most: int) -> float:
        """Tokens per second over plain decoding at the best number of draft tokens; 1 where none pays."""
        rates = [min(acceptance, MAX_ACCEPTANCE)] * num_sequences
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
