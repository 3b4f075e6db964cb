"""What a draft is to the decode worker: something that guesses the next tokens of some sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decode_worker.sequence import DecodeSequence
from tandem.engine.draw import Probs


@dataclass(slots=True)
class Proposal:
    """Draft tokens for one sequence. `probs` are what they were drawn from, where the draft was not sure."""

    token_ids: list[int] = field(default_factory=list)
    probs: list[Probs] = field(default_factory=list)  # empty unless drawn for speculative sampling
    is_tau_stop: bool = False  # the draft was unsure and stopped before its number
    confidence: float = 1.0  # the product of the probabilities of the draft's likeliest tokens


class Draft(Protocol):
    """Guesses are free to be wrong: verification alone decides. Called by the step thread only."""

    catch_up_s: float  # time spent so far on reading what it had missed

    def propose(
        self, sequences: Sequence[DecodeSequence], counts: Sequence[int], worth: float = 0.0
    ) -> list[Proposal]:
        """At most `counts[i]` tokens after everything sequence i has, the token not yet computed included.

        A draft that knows how sure it is ends a greedy sequence that may go by confidence after the token
        with which the chance that all stand falls below `worth`.
        """
        ...

    def num_unread(self, sequence: DecodeSequence) -> int:
        """Tokens it has to read before it can guess for this sequence."""
        ...

    def settle(self, sequence: DecodeSequence) -> None:
        """The step is over and `sequence` holds its new tokens: forget guesses that were rejected."""
        ...

    def leave(self, sequence: DecodeSequence) -> None:
        """The sequence has ended."""
        ...
