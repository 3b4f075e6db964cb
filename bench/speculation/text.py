"""Prompts and text that the bundled pair has not been trained on: the held-out modules of the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bench.bundled_pair.corpus import TokenArchive, archive, is_held_out, source_files, standard_library
from tandem.errors import ConfigError

Tokens = tuple[int, ...]


def held_out(model: Path) -> TokenArchive:
    """The held-out modules as tokens of the model. Raises `ConfigError` where the library has no source."""
    files = list(source_files(standard_library(), include_tests=False, wanted=is_held_out))
    if not files:
        raise ConfigError(
            f"{standard_library()} holds no Python source to measure on; install the library's .py files"
        )
    return archive(Tokenizer.from_file(str(model / "tokenizer.json")), files)


def prompts(data: TokenArchive, count: int, length: int) -> list[Tokens]:
    """Different prompts that begin at top-level statements, spread evenly over the text.

    Raises `ConfigError` if the text has fewer.
    """
    usable = data.starts[data.starts < len(data.tokens) - length]
    if len(usable) < count:
        raise ConfigError(f"the held-out text has {len(usable)} prompts of {length} tokens, not {count}")
    chosen = usable[np.arange(count) * len(usable) // count]
    return [tuple(data.tokens[start : start + length].tolist()) for start in chosen]


def windows(data: TokenArchive, count: int, length: int) -> list[Tokens]:
    """Stretches of text one after the other, spread evenly."""
    most = len(data.tokens) // length
    starts = np.arange(min(count, most)) * most // min(count, most) * length
    return [tuple(data.tokens[start : start + length].tolist()) for start in starts]


def batches(items: Sequence[Tokens], size: int) -> list[Sequence[Tokens]]:
    """In groups of `size`; the last may be smaller."""
    return [items[first : first + size] for first in range(0, len(items), size)]
