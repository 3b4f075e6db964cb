"""Plain steps of the same sequences where drafting does not pay: learnt from together.

To ask for a plan and to tell the outcome takes a tenth of the smallest steps; plain decoding does neither.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from decode_worker.decoder import Advance, PlainDecoder
from decode_worker.earnings import Earnings
from decode_worker.lookahead import StepOutcome
from decode_worker.sequence import DecodeSequence


class PlainRun:
    """At most `patience` steps, at least one. Requests count theirs at once: any may be the last."""

    def __init__(
        self, decoder: PlainDecoder, sequences: Sequence[DecodeSequence], patience: int, earnings: Earnings
    ) -> None:
        self.num_steps = 0
        self._decoder = decoder
        self._sequences = list(sequences)
        self._advances: list[Advance] = []  # of the last step
        self._patience = patience
        self._plain_s = earnings.plain_s(len(sequences))
        self._seconds = 0.0

    def goes_on_with(self, sequences: Sequence[DecodeSequence]) -> bool:
        return self.num_steps < self._patience and self._sequences == sequences

    def step(self) -> list[Advance]:
        """One token for each."""
        began_s = time.perf_counter()
        self._advances = self._decoder.step(self._sequences)
        took_s = time.perf_counter() - began_s
        self.num_steps += 1
        self._seconds += took_s
        plain_s = self._plain_s or took_s
        for sequence, advance in zip(self._sequences, self._advances, strict=True):
            sequence.speculated.count_plain(1, took_s, plain_s * len(advance.tokens))
        return self._advances

    def outcome(self) -> StepOutcome:
        """All steps so far."""
        mean_s = self._seconds / self.num_steps
        return StepOutcome(self._sequences, self._advances, 0.0, mean_s, self.num_steps)
