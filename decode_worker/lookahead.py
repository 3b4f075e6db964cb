"""How many tokens to draft for each sequence of a step: limits that always hold, and the simple policies.

    constant    the configured number
    heuristic   two more after a run that was accepted whole, one less after a rejection (transformers)
    auto        what brings the most tokens per second now (auto_lookahead.py)

0 is plain decoding. Pure: costs and outcomes are told, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decode_worker.decoder import Advance
from decode_worker.sequence import DecodeSequence
from tandem.config import SpeculationConfig

PATIENCE = 16  # plain steps, where drafting does not pay or nobody wants it


@dataclass(slots=True)
class StepOutcome:
    """What one step drafted, what stood, and how long its parts took. Plain steps of the same sequences may
    be told as one, with their mean time."""

    sequences: Sequence[DecodeSequence]
    advances: Sequence[Advance]
    draft_s: float  # without what the draft had to catch up on
    verify_s: float
    num_steps: int = 1
    num_tokens: int = field(init=False, default=0)
    num_rows: int = field(init=False, default=0)  # of the verifying forward
    num_drafting: int = field(init=False, default=0)  # sequences that the draft was asked about
    depth: int = field(init=False, default=0)  # forwards of the draft

    def __post_init__(self) -> None:
        for advance in self.advances:
            self.num_tokens += len(advance.tokens)
            self.num_rows += 1 + advance.num_drafted
            if num_guessed := advance.num_guessed:
                self.num_drafting += 1
                self.depth = max(self.depth, num_guessed)


class Lookahead(Protocol):
    """Chooses k for a step, and learns from it. Owned by the step thread."""

    worth: float  # the chance of being right so far with which one more draft token pays; 0: k alone decides
    patience: int  # plain steps of the same sequences before it wants to be asked, and told, again

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Draft tokens per sequence."""
        ...

    def observe(self, outcome: StepOutcome) -> None: ...

    def leave(self, sequence: DecodeSequence) -> None:
        """The sequence has ended."""
        ...


def limit(sequence: DecodeSequence, wanted: int, most: int) -> int:
    """At most what the request asks for, the server allows, and max_tokens leaves room for."""
    speculation = sequence.work.speculation
    if speculation.is_off:
        return 0
    return max(0, min(speculation.num_assistant_tokens or wanted, most, sequence.num_tokens_left - 1))


class ConstantLookahead:
    """The configured number for everybody."""

    worth = 0.0
    patience = PATIENCE

    def __init__(self, config: SpeculationConfig) -> None:
        self._wanted = config.num_assistant_tokens
        self._most = config.max_assistant_tokens

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        return [limit(sequence, self._wanted, self._most) for sequence in sequences]

    def observe(self, outcome: StepOutcome) -> None:
        """A constant learns nothing."""

    def leave(self, sequence: DecodeSequence) -> None:
        """Nothing is kept per sequence."""


class HeuristicLookahead:
    """As `num_assistant_tokens_schedule="heuristic"` of transformers, for each sequence by itself."""

    worth = 0.0
    patience = PATIENCE

    def __init__(self, config: SpeculationConfig) -> None:
        self._first = config.num_assistant_tokens
        self._most = config.max_assistant_tokens
        self._wanted: dict[DecodeSequence, int] = {}

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        return [limit(s, self._wanted.get(s, self._first), self._most) for s in sequences]

    def observe(self, outcome: StepOutcome) -> None:
        for sequence, advance in zip(outcome.sequences, outcome.advances, strict=True):
            if advance.num_drafted:
                is_whole = advance.num_accepted == advance.num_drafted
                wanted = self._wanted.get(sequence, self._first) + (2 if is_whole else -1)
                self._wanted[sequence] = min(max(wanted, 1), self._most)

    def leave(self, sequence: DecodeSequence) -> None:
        self._wanted.pop(sequence, None)
