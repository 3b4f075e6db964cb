"""Rotary position embedding: the angles of each position computed once, looked up by every forward.

A position's cosines come from the same page of positions whatever batch it is in and however many threads
run, so a row's bits cannot depend on either. Pages are too small for torch to split over threads.
"""

from __future__ import annotations

import math

import torch

from tandem.engine.lean.config import RopeConfig

PAGE = 128  # positions computed together


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """`[head_dim / 2]` float32, in the order of operations of transformers."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (config.theta**exponents)
    if config.low_freq_factor is None:
        return inv_freq / config.factor
    original, low, high = config.original_context, config.low_freq_factor, config.high_freq_factor
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > original / low, inv_freq / config.factor, inv_freq)
    smooth = (original / wavelen - low) / (high - low)
    between = (1 - smooth) * scaled / config.factor + smooth * scaled
    is_between = (wavelen >= original / high) & (wavelen <= original / low)
    return torch.where(is_between, between, scaled)


class Rope:
    """Turns query and key heads. The query's scale of attention is part of its angles."""

    def __init__(self, config: RopeConfig, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self._inv_freq = inverse_frequencies(config, head_dim)
        scale = torch.ones(num_heads + num_kv_heads, 1)
        scale[:num_heads] = head_dim**-0.5
        self._head_scale = scale
        self._table = torch.empty(0, 2, 1, head_dim)  # [positions, (cos, sin), 1, head_dim]

    def angles(self, positions: torch.Tensor, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines `[rows, heads + kv_heads, dim]`; no position reaches `num_positions`."""
        table = self._table
        if len(table) < num_positions:
            first = range(len(table), num_positions, PAGE)
            table = self._table = torch.cat([table, *(self._page(start) for start in first)])
        cos, sin = (table.index_select(0, positions) * self._head_scale).unbind(1)
        return cos, sin

    def _page(self, start: int) -> torch.Tensor:
        angle = torch.arange(start, start + PAGE).float()[:, None] * self._inv_freq
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1)[:, :, None]

    @staticmethod
    def turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn `heads` [rows, heads + kv_heads, dim] in place."""
        halves = heads.view(*heads.shape[:2], 2, -1)
        swapped = halves.flip(2).view(cos.shape).mul_(sin)
        heads.mul_(cos).add_(swapped)
