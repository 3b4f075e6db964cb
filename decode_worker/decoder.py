"""How a batch advances by one step. `PlainDecoder` is one token each; `SpeculativeDecoder` may be several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decode_worker.sequence import DecodeSequence
from tandem.engine.draw import Draw
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import NO_TOKEN, BadLogits, SampledToken, Sampler
from tandem.profiling.spans import span
from tandem.speculation_usage import SpeculationReport


@dataclass(slots=True)
class Advance:
    """What one step brought one sequence, before stops cut it. At least one token, unless logits were bad."""

    tokens: list[SampledToken] = field(default_factory=list)
    is_bad: bool = False  # the model gave no usable distribution
    num_drafted: int = 0
    num_accepted: int = 0
    is_tau_stop: bool = False

    @property
    def num_guessed(self) -> int:
        """Forwards of the draft: one that was not sure enough brought no token."""
        return self.num_drafted + self.is_tau_stop


def chosen_token(token_id: int) -> SampledToken | BadLogits:
    """What `ModelRunner.choose` found for a row."""
    return BadLogits() if token_id == NO_TOKEN else SampledToken(token_id)


def draws_of(sequences: Sequence[DecodeSequence], counts: Sequence[int]) -> list[Draw] | None:
    """For the next `counts[i]` tokens of sequence i; None where all are the most probable."""
    if all(sequence.sampling.params.is_greedy for sequence in sequences):
        return None
    return [s.sampling.draw(i) for s, count in zip(sequences, counts, strict=True) for i in range(count)]


def advance_by(sequence: DecodeSequence, token: SampledToken | BadLogits) -> Advance:
    """One sampled token; afterwards the sampling state knows it."""
    if isinstance(token, BadLogits):
        return Advance(is_bad=True)
    sequence.sampling.append(token.token_id)
    return Advance([token])


class Decoder(Protocol):
    """Owned by the step thread."""

    def step(self, sequences: Sequence[DecodeSequence]) -> list[Advance]:
        """One forward of the target; afterwards the sampling states know the new tokens."""
        ...

    def settle(self, sequences: Sequence[DecodeSequence]) -> None:
        """The sequences hold their new tokens now."""
        ...

    def leave(self, sequence: DecodeSequence) -> None:
        """The sequence has ended."""
        ...

    def report(self) -> SpeculationReport | None:
        """What speculation earns here; None without any. May be called from another thread."""
        ...


class PlainDecoder:
    """One token per sequence and step."""

    def __init__(self, model: ModelRunner) -> None:
        self._model = model
        self._sampler = Sampler()

    def step(self, sequences: Sequence[DecodeSequence]) -> list[Advance]:
        rows = [sequence.rows() for sequence in sequences]
        sampled: Sequence[SampledToken | BadLogits]
        if not any(sequence.needs_logits for sequence in sequences):
            token_ids = self._model.choose(rows, draws_of(sequences, [1] * len(sequences)))
            sampled = list(map(chosen_token, token_ids))
        else:
            logits = self._model.forward(self._model.batch(rows))
            with span("sample"):
                sampled = self._sampler.sample(logits, [sequence.sampling for sequence in sequences])
        return [advance_by(*pair) for pair in zip(sequences, sampled, strict=True)]

    def settle(self, sequences: Sequence[DecodeSequence]) -> None:
        """Nothing to do: what was computed stands."""

    def leave(self, sequence: DecodeSequence) -> None:
        """Nothing is kept per sequence."""

    def report(self) -> SpeculationReport | None:
        return None
