"""What a forward must read and compute, and what that says about a measured time.

Weights and KV are read once; a row costs two operations per weight, and attention four per number of a query
and token it sees. Activations and tables stay in the caches and are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.limits import Limits
from tandem.geometry import ModelGeometry


@dataclass(frozen=True, slots=True)
class Work:
    """Of one forward."""

    num_bytes: float
    num_flops: float

    def memory_share(self, seconds: float, limits: Limits) -> float:
        """The part of `seconds` that memory alone would have taken."""
        return self.num_bytes / limits.bytes_per_s / seconds

    def arithmetic_share(self, seconds: float, limits: Limits) -> float:
        """The part of `seconds` that products alone would have taken."""
        return self.num_flops / limits.flops / seconds


@dataclass(frozen=True, slots=True)
class Traffic:
    """A model as memory and arithmetic see it. Its embeddings are tied: the head reads them, rows do not."""

    geometry: ModelGeometry
    weight_bytes: float  # of one weight
    kv_dtype: str

    def decode(self, batch: int, context: int) -> Work:
        """A step of `batch` sequences, each on top of `context` cached tokens."""
        seen = batch * (context + 1)
        return self._work(batch * self.geometry.num_parameters, seen, seen)

    def prefill(self, num_tokens: int, batch: int = 1) -> Work:
        """`batch` prompts of `num_tokens` from nothing, with the logits of their last tokens."""
        head = self.geometry.vocab_size * self.geometry.hidden_size
        products = num_tokens * (self.geometry.num_parameters - head) + head
        return self._work(batch * products, batch * num_tokens * (num_tokens + 1) / 2, batch * num_tokens)

    def _work(self, products: float, pairs: float, kv_tokens: float) -> Work:
        """`pairs` of a query and a token it sees, `kv_tokens` that are read or written."""
        g = self.geometry
        return Work(
            g.num_parameters * self.weight_bytes + kv_tokens * g.kv_bytes_per_token(self.kv_dtype),
            2 * products + 4 * pairs * g.num_layers * g.num_heads * g.head_dim,
        )


@dataclass(frozen=True, slots=True)
class Slope:
    """How a decode step grows with the tokens that all its sequences see together."""

    seconds_per_token: float
    limit_s: float  # what reading a token's KV takes at the measured bandwidth

    @property
    def over_limit(self) -> float:
        """1 is the speed of memory; the goal is 1.3."""
        return self.seconds_per_token / self.limit_s


def slope(steps: Sequence[tuple[int, int, float]], kv_bytes: int, limits: Limits) -> Slope | None:
    """Least squares over (batch, context, seconds) with one slope and an intercept per batch.

    None unless some batch was measured at two contexts.
    """
    along = across = 0.0
    for batch in {batch for batch, _, _ in steps}:
        mine = [(batch * context, seconds) for other, context, seconds in steps if other == batch]
        middle, level = fmean(total for total, _ in mine), fmean(seconds for _, seconds in mine)
        along += sum((total - middle) ** 2 for total, _ in mine)
        across += sum((total - middle) * (seconds - level) for total, seconds in mine)
    return Slope(across / along, kv_bytes / limits.bytes_per_s) if along else None
