"""`auto` on a machine that others use: its speed changes from second to second, and nothing else does.

Tokens are counted against what steps would have cost on that machine if it were left alone.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from decode_worker.auto_lookahead import AutoLookahead
from decode_worker.decoder import Advance
from decode_worker.lookahead import StepOutcome
from decode_worker.step_costs import DraftCosts, StepCosts
from tandem.engine.costs import ROWS, ForwardCosts
from tandem.engine.sampler import SampledToken
from tandem.speculation import SpeculationParams

MILLISECONDS = {
    1: 10.8,
    4: 11.1,
    6: 12.1,
    8: 13.1,
    9: 16.4,
    12: 18.0,
    16: 22.5,
    32: 41.0,
    64: 84.0,
}  # by rows
SPEEDS = (1.0, 1.0, 1.2, 1.5, 2.0, 2.5)  # times as long, for 0.3 to 3 seconds each
NOISE, SPIKES, SPIKE = 0.05, 0.01, 3.0
START_ERROR = 0.15  # of what is measured at the start
STEPS = 2000


@dataclass(eq=False)
class Sequence:
    """What a look-ahead reads of a sequence."""

    num_tokens_left: int
    goes_by_confidence: bool = True
    work = SimpleNamespace(speculation=SpeculationParams())


class Machine:
    """Steps of `batch` sequences whose draft takes `draft_s` a token: what they bring, and what they cost."""

    def __init__(self, batch: int, draft_s: float, seed: int, *, is_busy: bool) -> None:
        self._rng = random.Random(seed)
        self._is_busy = is_busy
        self._slow, self._until_s, self._now_s = 1.0, 0.0, 0.0
        self._draft_s = draft_s
        self.sequences = [self._sequence() for _ in range(batch)]
        self.num_tokens, self.seconds = 0, 0.0  # seconds of a machine that is left alone

    def start_costs(self) -> StepCosts:
        target = [forward_s(rows) * (1 + self._rng.uniform(-START_ERROR, START_ERROR)) for rows in ROWS]
        draft = DraftCosts(0.0, ForwardCosts(ROWS, (self._draft_s,) * len(ROWS)))
        return StepCosts(ForwardCosts(ROWS, tuple(np.maximum.accumulate(target).tolist())), draft)

    def step(self, counts: list[int], worth: float) -> StepOutcome:
        advances = [self._advance(count, worth) for count in counts]
        draft_s = self._draft_s * max(advance.num_drafted for advance in advances)
        verify_s = forward_s(sum(1 + advance.num_drafted for advance in advances))
        self.seconds += draft_s + verify_s
        self.num_tokens += sum(len(advance.tokens) for advance in advances)
        if self._now_s >= self._until_s and self._is_busy:
            self._slow, self._until_s = self._rng.choice(SPEEDS), self._now_s + self._rng.uniform(0.3, 3.0)
        outcome = StepOutcome(list(self.sequences), advances, self._timed(draft_s), self._timed(verify_s))
        self._now_s += outcome.draft_s + outcome.verify_s
        return outcome

    def go_on(self, outcome: StepOutcome, lookahead: AutoLookahead) -> None:
        """One that has ended makes room for another."""
        for index, (sequence, advance) in enumerate(zip(self.sequences, outcome.advances, strict=True)):
            sequence.num_tokens_left -= len(advance.tokens)
            if sequence.num_tokens_left <= 1:
                lookahead.leave(sequence)  # type: ignore[arg-type]
                self.sequences[index] = self._sequence()

    def _sequence(self) -> Sequence:
        return Sequence(self._rng.randint(100, 400))

    def _advance(self, count: int, worth: float) -> Advance:
        """The draft is sure of most tokens, and right more often than it says."""
        num_drafted, num_accepted, confidence, stands = 0, 0, 1.0, True
        while num_drafted < count and confidence >= worth**2:
            sure = 0.97 if self._rng.random() < 0.7 else self._rng.uniform(0.2, 0.8)
            num_drafted, confidence = num_drafted + 1, confidence * sure
            stands = stands and self._rng.random() < sure**0.5
            num_accepted += stands
        tokens = [SampledToken(1)] * (1 + num_accepted)
        return Advance(tokens, num_drafted=num_drafted, num_accepted=num_accepted)

    def _timed(self, seconds: float) -> float:
        noise = math.exp(self._rng.gauss(0, NOISE)) * (SPIKE if self._rng.random() < SPIKES else 1.0)
        return seconds * self._slow * noise if self._is_busy else seconds


def forward_s(rows: int) -> float:
    return 1e-3 * float(np.interp(rows, list(MILLISECONDS), list(MILLISECONDS.values())))


def gain(batch: int, draft_s: float, seed: int, *, is_busy: bool) -> float:
    """Tokens per second of a machine that is left alone, over those of plain decoding."""
    machine = Machine(batch, draft_s, seed, is_busy=is_busy)
    costs = machine.start_costs()
    lookahead = AutoLookahead(8, costs, has_confidence=True)
    for _ in range(STEPS):
        counts = lookahead.counts(machine.sequences)  # type: ignore[arg-type]
        outcome = machine.step(counts, lookahead.worth)
        costs.observe(outcome)
        lookahead.observe(outcome)
        machine.go_on(outcome, lookahead)
    return machine.num_tokens / machine.seconds * forward_s(batch) / batch


@pytest.mark.parametrize(
    ("batch", "draft_s", "least"),
    [(1, 0.25e-3, 3.5), (1, 1.8e-3, 2.3), (4, 0.4e-3, 1.5), (4, 2.2e-3, 1.3), (16, 0.5e-3, 0.99)],
)
def test_drafting_brings_as_much_on_a_busy_machine(batch: int, draft_s: float, least: float) -> None:
    steady, busy = (
        statistics.median(gain(batch, draft_s, seed, is_busy=is_busy) for seed in range(5))
        for is_busy in (False, True)
    )
    assert steady > least
    assert busy > 0.95 * steady
