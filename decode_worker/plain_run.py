"""Plain steps of the same sequences where drafting does not pay: learnt from together.

To ask for a plan and to tell the outcome takes a tenth of the smallest steps, and to count for each
sequence a fiftieth; plain decoding does neither.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from decode_worker.decoder import Advance, PlainDecoder
from decode_worker.earnings import Earnings
from decode_worker.lookahead import StepOutcome
from decode_worker.sequence import DecodeSequence
from tandem.speculation_usage import SpeculationUsage


class PlainRun:
    """At most `patience` steps, at least one, counted together; a request that ends takes its own of them."""

    def __init__(
        self, decoder: PlainDecoder, sequences: Sequence[DecodeSequence], patience: int, earnings: Earnings
    ) -> None:
        self._decoder = decoder
        self._sequences = list(sequences)
        self._advances: list[Advance] = []  # of the last step
        self._patience = patience
        self._plain_s = earnings.plain_s(len(sequences))
        self._tally = SpeculationUsage()  # of each of them
        for sequence in sequences:
            sequence.tally = self._tally

    @property
    def num_steps(self) -> int:
        return self._tally.num_steps

    def goes_on_with(self, sequences: Sequence[DecodeSequence]) -> bool:
        return self.num_steps < self._patience and self._sequences == sequences

    def step(self) -> list[Advance]:
        """One token for each."""
        began_s = time.perf_counter()
        self._advances = self._decoder.step(self._sequences)
        took_s = time.perf_counter() - began_s
        self._tally.count_plain(1, took_s, self._plain_s or took_s)
        return self._advances

    def end(self) -> StepOutcome:
        """All steps, which their sequences know of from now on."""
        for sequence in self._sequences:
            if sequence.tally is self._tally:
                sequence.usage()
        mean_s = self._tally.verify_s / self.num_steps
        return StepOutcome(self._sequences, self._advances, 0.0, mean_s, self.num_steps)
