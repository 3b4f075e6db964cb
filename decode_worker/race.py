"""Drafting against plain decoding as both really went: what no model of costs can get wrong."""

from __future__ import annotations

FADE = 0.95  # weight of the past, per step
BESIDE_FADE = 0.8  # per plain step that is set beside them
MIN_STEPS = 12.0  # faded drafting steps before a verdict
MAX_RESIZE = 1.25  # a batch that changed more than this is another race
BESIDE = range(2, 5)  # plain steps in a row that are set beside drafting ones


class Race:
    """Tokens per second of drafting steps over those of plain ones, for a batch of about one size.

    Plain steps are set beside the drafting ones they come behind, as the machine's pace changes. The first
    of them does not count: it finds the draft's weights in the caches, which no step of plain decoding does.
    """

    def __init__(self) -> None:
        self._num_sequences = 0
        self._clear()

    def _clear(self) -> None:
        self._drafting = [0.0, 0.0, 0.0]  # steps, tokens per sequence, seconds
        self._num_plain = 0  # since the last drafting one
        self._gain = self._weight = 0.0

    def note(self, num_sequences: int, is_drafting: bool, num_tokens: int, seconds: float) -> None:
        """One step of this many sequences."""
        low, high = sorted((max(self._num_sequences, 1), num_sequences))
        if high > low * MAX_RESIZE:
            self._num_sequences = num_sequences
            self._clear()
        if is_drafting:
            self._num_plain = 0
            for index, value in enumerate((1.0, num_tokens / num_sequences, seconds)):
                self._drafting[index] = FADE * self._drafting[index] + value
            return
        self._num_plain += 1
        _, tokens_each, drafting_s = self._drafting
        if self._num_plain in BESIDE and drafting_s:
            self._weight = BESIDE_FADE * self._weight + 1
            self._gain += (seconds * tokens_each / drafting_s - self._gain) / self._weight

    @property
    def gain(self) -> float | None:
        """None before both kinds have shown theirs."""
        return self._gain if self._drafting[0] >= MIN_STEPS and self._weight else None
