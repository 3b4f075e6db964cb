"""Perplexity of a text in windows that overlap, so that most tokens have context before them.

A window of `max_length` tokens moves on by `stride`; only tokens that no window scored before are scored.
That is transformers' recipe for models of fixed context; usual are a stride of 512 and windows of 2,048. The
forward is the engine's own in this process: the service has no log-probabilities of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.measure import Meter
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.geometry import num_blocks
from tandem.tokenizer import Tokenizer

BLOCK_SIZE = 16
STRIDE, MAX_LENGTH = 512, 2048


class Window(NamedTuple):
    """Tokens `begin` to `end` go in, those from `first` on are scored."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Scored:
    """One window's figures; `nats` is the sum over its scored tokens."""

    begin: int
    tokens: int
    nats: float


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood per scored token, natural logarithm."""

    task: str
    tokens: int
    nats: float  # per token
    perplexity: float
    stride: int
    max_length: int
    windows: list[Scored]


def windows(num_tokens: int, stride: int, max_length: int) -> Iterator[Window]:
    """Every token but the first is scored once."""
    scored = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + max_length, num_tokens)
        if end > scored:
            yield Window(begin, scored, end)
        scored = end
        if end == num_tokens:
            return


def measure(
    text: Path,
    model: Path,
    *,
    stride: int = STRIDE,
    max_length: int = MAX_LENGTH,
    limit: int | None = None,
    **options: Any,
) -> Perplexity:
    """Of the text's first `limit` tokens. `options` are those of `ModelRunner.load`. Raises `ConfigError`.

    Windows are never longer than the model's context.
    """
    tokens = _tokens(text, model)[:limit]
    blocks = num_blocks(max_length, BLOCK_SIZE)
    runner = ModelRunner.load(model, num_blocks=blocks, block_size=BLOCK_SIZE, **options)
    length = min(max_length, runner.geometry.max_context)
    if not 1 <= stride < length:
        raise ConfigError(f"the stride must be at least 1 and less than the window of {length}, not {stride}")
    if len(tokens) < 2:
        raise ConfigError(f"{text} has fewer than two tokens")
    wanted, found = list(windows(len(tokens), stride, length)), []
    with Meter("perplexity", len(wanted)) as meter:
        for window in wanted:
            nats = _nats(runner, tokens, window)
            found.append(Scored(window.begin, window.end - window.first, nats))
            meter.step()
    count = sum(one.tokens for one in found)
    mean = math.fsum(one.nats for one in found) / count
    return Perplexity("WikiText", count, mean, math.exp(mean), stride, length, found)


def _nats(runner: ModelRunner, tokens: Sequence[int], window: Window) -> float:
    shown = tokens[window.begin : window.end - 1]
    rows = SequenceRows(
        shown, 0, range(num_blocks(len(shown), BLOCK_SIZE)), num_logits=window.end - window.first
    )
    logits = runner.forward(runner.batch([rows]))  # [scored, vocab] float32
    expected = torch.tensor(tokens[window.first : window.end], device=logits.device)
    return F.cross_entropy(logits.float(), expected, reduction="sum").item()


def _tokens(text: Path, model: Path) -> list[int]:
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text} is not UTF-8 text (byte {error.start})") from error
    return Tokenizer.from_dir(model).encode(content, add_special_tokens=False)
