"""How many tokens to draft for each sequence of a step. Pure: costs and outcomes are told, not measured.

With acceptance rate α per token a step of k draft tokens brings (1 - α^(k+1)) / (1 - α) tokens
(Leviathan et al. 2023). `AutoLookahead` picks the k that brings the most per second, given what a
forward of the target and of the draft costs at these row counts. k = 0 is plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from decode_worker.sequence import DecodeSequence
from tandem.config import SpeculationConfig
from tandem.engine.costs import ForwardCosts

SMOOTHING = 0.1  # of the newest outcome in the acceptance rate and the cost corrections
PRIOR_ACCEPTANCE = 0.6
MAX_ACCEPTANCE = 0.98
HYSTERESIS = 1.03  # another k must be this much better than the one in use
PROBE_EVERY = 64  # steps without drafts after which one draft token is tried, to see whether it pays again


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step drafted, what stood, and how long its two parts took."""

    num_sequences: int
    depth: int  # the most draft tokens of one sequence
    num_rows: int  # of the verifying forward
    num_judged: int  # draft tokens up to and including the first rejected one of each sequence
    num_accepted: int
    draft_s: float
    verify_s: float


class Lookahead(Protocol):
    """Chooses k for a step, and learns from it."""

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]: ...

    def observe(self, outcome: StepOutcome) -> None: ...


def limit(sequence: DecodeSequence, wanted: int, most: int) -> int:
    """At most what the request asks for, the server allows, and max_tokens leaves room for."""
    speculation = sequence.work.speculation
    if speculation.is_off:
        return 0
    left = sequence.work.max_tokens - sequence.output.num_tokens
    return max(0, min(speculation.num_assistant_tokens or wanted, most, left - 1))


class ConstantLookahead:
    """The configured number for everybody."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._wanted = config.num_assistant_tokens
        self._most = config.max_assistant_tokens

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Draft tokens per sequence."""
        return [limit(sequence, self._wanted, self._most) for sequence in sequences]

    def observe(self, outcome: StepOutcome) -> None:
        """A constant learns nothing."""


class AutoLookahead:
    """The k that brings the most tokens per second now."""

    def __init__(self, most: int, target: ForwardCosts, draft: ForwardCosts | None) -> None:
        self._most = most
        self._target = target
        self._draft = draft  # None: drafting costs nothing that counts (prompt lookup)
        self._target_scale = self._draft_scale = 1.0  # measured over expected, lately
        self._depth = 0
        self._num_plain = 0
        self.acceptance = PRIOR_ACCEPTANCE

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Draft tokens per sequence; those that a request asks for by number are its own choice."""
        self._depth = self._choose(len(sequences))
        depth = self._depth
        if depth == 0:
            self._num_plain += 1
            depth = int(self._num_plain % PROBE_EVERY == 0)
        return [
            limit(sequence, depth, self._most) if depth or _asks(sequence) else 0 for sequence in sequences
        ]

    def observe(self, outcome: StepOutcome) -> None:
        """Move the acceptance rate and the cost corrections towards what this step showed."""
        if outcome.num_judged:
            rate = outcome.num_accepted / outcome.num_judged
            weight = 1 - (1 - SMOOTHING) ** min(outcome.num_judged, 10)
            self.acceptance += weight * (rate - self.acceptance)
        self._target_scale = _follow(self._target_scale, outcome.verify_s, self._target.at(outcome.num_rows))
        if self._draft is not None and outcome.depth:
            expected_s = outcome.depth * self._draft.at(outcome.num_sequences)
            self._draft_scale = _follow(self._draft_scale, outcome.draft_s, expected_s)

    def gain(self, num_sequences: int, depth: int) -> float:
        """Expected tokens per second at this depth over those of plain decoding."""
        return self._rate(num_sequences, depth) / self._rate(num_sequences, 0)

    def _choose(self, num_sequences: int) -> int:
        rates = [self._rate(num_sequences, depth) for depth in range(self._most + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        return best if rates[best] > HYSTERESIS * rates[self._depth] else self._depth

    def _rate(self, num_sequences: int, depth: int) -> float:
        alpha = min(self.acceptance, MAX_ACCEPTANCE)
        tokens = (1 - alpha ** (depth + 1)) / (1 - alpha)
        draft_s = self._draft_scale * self._draft.at(num_sequences) if self._draft else 0.0
        verify_s = self._target_scale * self._target.at(num_sequences * (1 + depth))
        return num_sequences * tokens / (depth * draft_s + verify_s)


def _asks(sequence: DecodeSequence) -> bool:
    return sequence.work.speculation.num_assistant_tokens is not None


def _follow(scale: float, measured_s: float, expected_s: float) -> float:
    return scale + SMOOTHING * (measured_s / expected_s - scale) if expected_s > 0 else scale
