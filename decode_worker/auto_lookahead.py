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

from collections.abc import Callable, Sequence
from statistics import fmean

from decode_worker.lookahead import PATIENCE, StepOutcome, limit
from decode_worker.probe import Probe
from decode_worker.race import Race
from decode_worker.sequence import DecodeSequence
from decode_worker.step_costs import MAX_ACCEPTANCE, Division, StepCosts

PRIOR_ACCEPTANCE = 0.7  # before anything was judged, and forgotten rates come back to it
MEMORY = 64.0  # draft tokens of a sequence that count; older ones fade
PRIOR_WEIGHT = 8.0  # draft tokens that the worker's own rate counts for in a new sequence
SMOOTHING = 0.02  # of the newest draft token in the worker's rate
START_GAIN = 1.08  # drafting starts if it promises this much over plain decoding,
STOP_GAIN = 1.0  # and ends when it promises no more than this
CALIBRATE_EVERY = 64  # among so many drafting steps
CALIBRATE_AT = (6, 7, 8)  # these are plain ones: they show what plain decoding costs now (race.py)
PAUSE = 128  # plain steps after drafting has lost the race; doubles each time
MAX_PAUSE = 4096
PLAN_STEPS = 16  # a division of the rows is used for so many, while the batch stays the same
PLAIN_PLAN_STEPS = 256  # and one without draft tokens: there is less to learn meanwhile
FORGET = 0.003  # of the distance to the prior rate, per plain step
READ_MARGIN = 2.0  # reading is to win back so many times what it costs: requests may end before their limit


def _nothing(_: DecodeSequence) -> int:
    return 0


class AutoLookahead:
    """Reads `costs`, which somebody keeps up to date, and how much its draft has `unread` of a sequence;
    tokens are accepted at the `prior` rate until it is known better."""

    def __init__(
        self,
        most: int,
        costs: StepCosts,
        unread: Callable[[DecodeSequence], int] = _nothing,
        *,
        has_confidence: bool = False,
        prior: float = PRIOR_ACCEPTANCE,
    ) -> None:
        self.worth = 0.0
        self.patience = PATIENCE
        self.acceptance = self._prior = prior
        self._costs = costs
        self._most = most
        self._unread = unread
        self._has_confidence = has_confidence  # the draft
        self._accepted: dict[DecodeSequence, tuple[float, float]] = {}  # accepted, judged; both fade
        self._is_drafting = False
        self._planned: list[DecodeSequence] = []
        self._plan: list[int] = []  # draft tokens of each
        self._plan_age = 0
        self._is_asked = False  # some of them ask for a number
        self._num_drafting = 0
        self._race = Race()
        self._pause, self._pause_left = PAUSE, 0
        self._probe = Probe()

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Draft tokens per sequence; those that a request asks for by number are its own choice."""
        plan_steps = PLAN_STEPS if self._is_drafting else PLAIN_PLAN_STEPS
        if self._plan_age >= plan_steps or self._planned != sequences:
            self._planned, self._plan, self._plan_age = list(sequences), self._divide(sequences), 0
            self._is_asked = any(s.work.speculation.num_assistant_tokens is not None for s in sequences)
        self._plan_age += 1
        if not (self._is_drafting or self._is_asked):
            return self._probed(sequences)
        self._num_drafting += self._is_drafting
        is_plain = self._num_drafting % CALIBRATE_EVERY in CALIBRATE_AT
        planned = [0] * len(sequences) if is_plain else self._plan
        counts = [self._limited(s, count) for s, count in zip(sequences, planned, strict=True)]
        return counts if any(counts) or self._is_drafting else self._probed(sequences)

    def observe(self, outcome: StepOutcome) -> None:
        """Learn acceptance, per sequence and overall, and what steps of this kind bring."""
        is_drafting = outcome.depth > 0
        if is_drafting:
            self._learn_acceptance(outcome)
            self._probe.has_drafted()
        else:
            self._pass_by(outcome.num_steps)
        if outcome.draft_s and not is_drafting:
            return  # the draft was asked and is still reading: neither kind of step
        seconds = outcome.draft_s + outcome.verify_s
        self._race.note(len(outcome.advances), is_drafting, outcome.num_tokens, seconds)

    def _pass_by(self, num_steps: int) -> None:
        """Plain steps: a low acceptance rate is forgotten slowly, as the next text may be an easier one."""
        self._pause_left -= num_steps
        if not self._is_drafting:
            self._plan_age += num_steps - 1
            self._probe.pass_by(num_steps)
            self.acceptance += num_steps * FORGET * max(self._prior - self.acceptance, 0.0)

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
        """Now and then one token for the newest of the sequences of which the draft has least to read."""
        counts = [0] * len(sequences)
        if not self._probe.is_near:
            return counts
        unread = [self._unread(s) for s in sequences]
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
        if self._is_drafting and (self._race.gain or 1.0) < STOP_GAIN:
            self._pause_left, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE)
            self._race = Race()
        was_drafting, self._is_drafting = self._is_drafting, False
        self.worth, self.patience = 0.0, PATIENCE
        if self._pause_left > 0:
            return [0] * len(sequences)
        rates, best = self._best(sequences)
        hopeful = [rate for rate in rates if rate > 0]
        self._is_drafting = bool(hopeful) and best.gain > (STOP_GAIN if was_drafting else START_GAIN)
        if not self._is_drafting:
            return [0] * len(sequences)
        if self._has_confidence:
            self.worth = self._costs.worth(best, fmean(hopeful))
        self.patience = 1  # plain steps among drafting ones are looked at one by one
        if not was_drafting:
            self._probe.restart()
        return best.counts

    def _best(self, sequences: Sequence[DecodeSequence]) -> tuple[list[float], Division]:
        """Acceptance rates [sequences] and what to make of them; 0 for those not worth reading."""
        rates = [self._rate(s) for s in sequences]
        best = self._costs.best(rates, self._most)
        unread = [self._unread(s) for s in sequences]
        if best.gain > 1 and any(unread):
            won_s = self._costs.plain_s(len(sequences)) / len(sequences) * (1 - 1 / best.gain)  # per token
            needed = [READ_MARGIN * self._costs.read_s(num_tokens) / won_s for num_tokens in unread]
            is_dear = [tokens > s.num_tokens_left for tokens, s in zip(needed, sequences, strict=True)]
            if any(is_dear):
                rates = [0.0 if dear else rate for rate, dear in zip(rates, is_dear, strict=True)]
                best = self._costs.best(rates, self._most)
        return rates, best
