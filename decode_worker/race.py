"""Drafting against plain decoding as both really went: what no model of costs can get wrong."""

from __future__ import annotations

FADE = 0.95  # weight of the past, per step
MIN_STEPS = 12.0  # faded drafting steps before a verdict
MAX_RESIZE = 1.25  # a batch that changed more than this is another race


class Race:
    """Tokens per second of recent steps of both kinds, for a batch of about one size."""

    def __init__(self) -> None:
        self._num_sequences = 0
        self._clear()

    def note(self, num_sequences: int, is_drafting: bool, num_tokens: int, seconds: float) -> None:
        """One step of this many sequences; `seconds` as they would be at a pace of 1."""
        low, high = sorted((max(self._num_sequences, 1), num_sequences))
        if high > low * MAX_RESIZE:
            self._num_sequences = num_sequences
            self._clear()
        side = self._sides[is_drafting]
        for index, value in enumerate((1.0, num_tokens / num_sequences, seconds)):
            side[index] = FADE * side[index] + value

    @property
    def gain(self) -> float | None:
        """Tokens per second of drafting steps over those of plain ones; None before both have shown it."""
        plain, drafting = self._sides
        if plain[0] < 1 or drafting[0] < MIN_STEPS or not plain[2]:
            return None
        return (drafting[1] / drafting[2]) / (plain[1] / plain[2])

    def _clear(self) -> None:
        self._sides = ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])  # steps, tokens per sequence, seconds; plain first
