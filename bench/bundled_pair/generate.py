"""Sampling of continuations from a model, many rows at once.

Knows tokens, temperatures and the key/value cache. Knows nothing of the corpus or of training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.bundled_pair.corpus import TokenArchive
from bench.bundled_pair.model import KeyValueCache, Llama
from bench.bundled_pair.runtime import autocast


def prompts(data: TokenArchive, rows: int, length: int, rng: np.random.Generator, aligned: float) -> Tensor:
    """Token rows from random places of the archive; a share begins at top-level statements."""
    limit = len(data.tokens) - length
    usable = data.starts[data.starts < limit]
    anywhere = rng.integers(0, limit, rows)
    begins = np.where(rng.random(rows) < aligned, rng.choice(usable, rows), anywhere)
    return torch.from_numpy(data.tokens[begins[:, None] + np.arange(length)].astype(np.int64))


def choose(logits: Tensor, temperatures: Tensor, generator: torch.Generator | None) -> Tensor:
    """The next token of every row: the best one at temperature zero, else a sample."""
    scaled = logits.float() / temperatures.clamp(min=1e-4)[:, None]
    noise = torch.empty_like(scaled).exponential_(generator=generator).clamp(min=1e-10)
    sampled = (scaled.softmax(-1) / noise).argmax(-1)
    return torch.where(temperatures > 0, sampled, logits.argmax(-1))


@torch.no_grad()
def continuations(
    model: Llama, ids: Tensor, steps: int, temperatures: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """The prompts with `steps` tokens after them; end-of-text does not stop a row."""
    cache = KeyValueCache(model.shape, ids.shape[0], ids.shape[1] + steps, ids)
    out, step = [ids], ids
    for _ in range(steps):
        with autocast(ids.device):
            logits = model(step, cache)[:, -1]
        step = choose(logits, temperatures, generator)[:, None]
        out.append(step)
    return torch.cat(out, dim=1)
