"""Perplexity in windows that slide over a text, and how often the likeliest token is another model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.quality.perplexity import Window, windows
from bench.speculation.rig import BLOCK_SIZE
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.geometry import ModelGeometry, num_blocks

STRIDE, MAX_LENGTH = 512, 2048


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model thinks of a text."""

    perplexity: float
    choices: torch.Tensor  # [scored tokens] int64: the likeliest token of each place

    def agreement(self, other: Reading) -> float:
        """Share of places with the same likeliest token."""
        return (self.choices == other.choices).float().mean().item()


def window_length(geometry: ModelGeometry) -> int:
    """The usual one, clipped to the model's context."""
    return min(MAX_LENGTH, geometry.max_context)


def stride_of(length: int) -> int:
    """The usual one, or half of a shorter window."""
    return min(STRIDE, length // 2)


def read(model: ModelRunner, tokens: Sequence[int]) -> Reading:
    """Every token but the first is scored once. Overwrites the cache's first blocks."""
    length = window_length(model.geometry)
    nats, choices = 0.0, []
    for window in windows(len(tokens), stride_of(length), length):
        logits = _logits(model, tokens, window)
        expected = torch.tensor(tokens[window.first : window.end], device=logits.device)
        nats += F.cross_entropy(logits, expected, reduction="sum").item()
        choices.append(logits.argmax(-1).cpu())
    return Reading(math.exp(nats / (len(tokens) - 1)), torch.cat(choices))


def _logits(model: ModelRunner, tokens: Sequence[int], window: Window) -> torch.Tensor:
    """`[scored tokens, vocab]` float32."""
    shown = tokens[window.begin : window.end - 1]
    table = range(num_blocks(len(shown), BLOCK_SIZE))
    rows = SequenceRows(shown, 0, table, num_logits=window.end - window.first)
    return model.forward(model.batch([rows]))
