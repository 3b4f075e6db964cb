"""How many tokens to draft for each sequence of a step. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from decode_worker.sequence import DecodeSequence
from tandem.config import SpeculationConfig


class ConstantLookahead:
    """The same number for everybody, within what the request asks for and has room for."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config

    def counts(self, sequences: Sequence[DecodeSequence]) -> list[int]:
        """Draft tokens per sequence; 0 is plain decoding. A token past max_tokens is never drafted."""
        return [self._count(sequence) for sequence in sequences]

    def _count(self, sequence: DecodeSequence) -> int:
        speculation = sequence.work.speculation
        if speculation.is_off:
            return 0
        wanted = speculation.num_assistant_tokens or self._config.num_assistant_tokens
        left = sequence.work.max_tokens - sequence.output.num_tokens
        return max(0, min(wanted, self._config.max_assistant_tokens, left - 1))
