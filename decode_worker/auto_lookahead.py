"""As many draft tokens as bring the most tokens per second now, shared out over the batch.

A draft token at place d of a sequence whose tokens are accepted at rate α stands with probability α^d
(Leviathan et al. 2023). A step that verifies a set of them brings B + Σ α_i^d tokens and takes the
draft's forwards plus one of B + n rows. Places are taken in order of their probability, over all sequences,
as many as bring the most per second: sequences that agree with their draft get more rows than those
that do not, and a full batch gets none. (SmartSpec, Liu et al. 2024, chooses one k for all.)

A draft that has not read a sequence's prompt reads it only where drafting will win that time back.

A draft that knows how sure it is does better for greedy requests: it goes on for as long as the chance that
all its tokens stand is worth the next one's cost, by the costs of the division above, and further than that.

Costs are a model, and models err: where steps with drafts turn out slower per token than plain ones, drafting
pauses, longer each time (race.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from decode_worker.lookahead import StepOutcome, limit
from decode_worker.probe import Probe
from decode_worker.race import Race
from decode_worker.sequence import DecodeSequence
from decode_worker.step_costs import MAX_ACCEPTANCE, Division, Floats, StepCosts

PRIOR_ACCEPTANCE = 0.7
MEMORY = 64.0  # draft tokens of a sequence that count; older ones fade
PRIOR_WEIGHT = 8.0  # draft tokens that the worker's own rate counts for in a new sequence
SMOOTHING = 0.02  # of the newest draft token in the worker's rate
START_GAIN = 1.08  # drafting starts if it promises this much over plain decoding,
STOP_GAIN = 1.0  # and ends when it promises no more than this
CALIBRATE_EVERY = 64  # among so many drafting steps
CALIBRATE_AT = (6, 12)  # these are plain ones: they show what plain decoding costs now
PAUSE = 128  # plain steps after drafting has lost the race; doubles each time
MAX_PAUSE = 4096
PLAN_STEPS = 16  # a division of the rows is used for so many, while the batch stays the same
PLAIN_PLAN_STEPS = 64  # and one without draft tokens: there is less to learn meanwhile
FORGET = 0.003  # of the distance to the prior rate, per plain step
READ_MARGIN = 2.0  # reading is to win back so many times what it costs: requests may end before their limit


def _nothing(_: DecodeSequence) -> int:
    return 0


class AutoLookahead:
    """Reads `costs`, which somebody keeps up to date, and how much its draft has `unread` of a sequence."""

    def __init__(
        self,
        most: int,
        costs: StepCosts,
        unread: Callable[[DecodeSequence], int] = _nothing,
        *,
        has_confidence: bool = False,
    ) -> None:
        self.worth = 0.0
        self.acceptance = PRIOR_ACCEPTANCE
        self._costs = costs
        self._most = most
        self._unread = unread
        self._has_confidence = has_confidence  # the draft
        self._accepted: dict[DecodeSequence, tuple[float, float]] = {}  # accepted, judged; both fade
        self._is_drafting = False
        self._plan: dict[DecodeSequence, int] = {}
        self._plan_age = 0
        self._num_drafting = 0
        self._race = Race()
        self._pause, self._pause_left = PAUSE, 0
        self._probe = Probe()

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Draft tokens per sequence; those that a request asks for by number are its own choice."""
        plan_steps = PLAN_STEPS if self._is_drafting else PLAIN_PLAN_STEPS
        if self._plan_age >= plan_steps or self._plan.keys() != set(sequences):
            self._plan, self._plan_age = dict(zip(sequences, self._divide(sequences), strict=True)), 0
        self._plan_age += 1
        self._num_drafting += self._is_drafting
        is_plain = self._num_drafting % CALIBRATE_EVERY in CALIBRATE_AT
        counts = [self._limited(s, 0 if is_plain else self._plan[s]) for s in sequences]
        return counts if any(counts) or self._is_drafting else self._probed(sequences)

    def observe(self, outcome: StepOutcome) -> None:
        """Learn acceptance, per sequence and overall, and what steps of this kind bring."""
        is_drafting = outcome.depth > 0
        if is_drafting:
            self._learn_acceptance(outcome)
            self._probe.has_drafted()
        num_tokens = sum(len(advance.tokens) for advance in outcome.advances)
        self._race.note(len(outcome.advances), is_drafting, num_tokens, outcome.draft_s + outcome.verify_s)
        self._pause_left -= not is_drafting

    def _learn_acceptance(self, outcome: StepOutcome) -> None:
        for sequence, advance in zip(outcome.sequences, outcome.advances, strict=True):
            if not advance.num_guessed:
                continue
            judged = min(advance.num_accepted + 1, advance.num_guessed)  # none given: rejected
            if self._goes_by_confidence(sequence):
                judged = 1  # the first says how often the draft is right; later ones, when it is sure
            num_accepted = min(advance.num_accepted, judged)
            accepted, seen = self._accepted.get(sequence, (0.0, 0.0))
            fade = (1 - 1 / MEMORY) ** judged
            self._accepted[sequence] = (accepted * fade + num_accepted, seen * fade + judged)
            weight = 1 - (1 - SMOOTHING) ** judged
            self.acceptance += weight * (num_accepted / judged - self.acceptance)

    def leave(self, sequence: DecodeSequence) -> None:
        self._accepted.pop(sequence, None)

    def _limited(self, sequence: DecodeSequence, planned: int) -> int:
        """A request that asks for a number has it even where the plan says none."""
        if planned and self._goes_by_confidence(sequence):
            planned = self._most
        asks = sequence.work.speculation.num_assistant_tokens is not None
        return limit(sequence, planned, self._most) if planned or asks else 0

    def _goes_by_confidence(self, sequence: DecodeSequence) -> bool:
        return self._has_confidence and sequence.goes_by_confidence

    def _probed(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Now and then one token for a sequence of which the draft has little to read, the newest of those.

        A low acceptance rate is forgotten slowly meanwhile: the next text may be an easier one.
        """
        self.acceptance += FORGET * max(PRIOR_ACCEPTANCE - self.acceptance, 0.0)
        counts, unread = [0] * len(sequences), [self._unread(s) for s in sequences]
        chosen = min(reversed(range(len(sequences))), key=unread.__getitem__)
        if self._probe.is_due(self._costs.read_s(unread[chosen]), self._costs.plain_s(len(sequences))):
            counts[chosen] = limit(sequences[chosen], 1, self._most)
        return counts

    def _rate(self, sequence: DecodeSequence) -> float:
        accepted, seen = self._accepted.get(sequence, (0.0, 0.0))
        rate = (accepted + PRIOR_WEIGHT * self.acceptance) / (seen + PRIOR_WEIGHT)
        return min(rate, MAX_ACCEPTANCE)

    def _divide(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Draft tokens per sequence that bring the most per second; none if plain decoding does."""
        rates, best = self._best(sequences)
        needed = STOP_GAIN if self._is_drafting else START_GAIN
        if self._is_drafting and (self._race.gain or 1.0) < STOP_GAIN:
            self._pause_left, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE)
            self._race = Race()
        if self._pause_left > 0:
            needed = math.inf
        was_drafting, self._is_drafting = self._is_drafting, best.gain > needed
        self.worth = 0.0
        if not self._is_drafting:
            return [0] * len(sequences)
        if self._has_confidence:
            self.worth = self._costs.worth(best, float(rates[rates > 0].mean()))
        if not was_drafting:
            self._probe.restart()
        return list(map(int, best.counts))

    def _best(self, sequences: Sequence[DecodeSequence]) -> tuple[Floats, Division]:
        """Acceptance rates [sequences] and what to make of them; 0 for those not worth reading."""
        rates = np.array([self._rate(s) for s in sequences])
        best = self._costs.best(rates, self._most)
        unread = [self._unread(s) for s in sequences]
        if best.gain > 1 and any(unread):
            won_s = self._costs.plain_s(len(sequences)) / len(sequences) * (1 - 1 / best.gain)  # per token
            needed = [READ_MARGIN * self._costs.read_s(num_tokens) / won_s for num_tokens in unread]
            is_dear = [tokens > s.num_tokens_left for tokens, s in zip(needed, sequences, strict=True)]
            if any(is_dear):
                rates[is_dear] = 0.0
                best = self._costs.best(rates, self._most)
        return rates, best
